/* `viaduct info` of a checkpoint. */
#ifndef VD_INFO_CHECKPOINT_H
#define VD_INFO_CHECKPOINT_H

#include "io/h5.h"

/* Not collective. The caller holds the HDF5 lock. Prints an open checkpoint: its update, parameters, spans, optimiser
 * state, memories and settings; `path` names it in messages. VD_FAILED when a dataset or attribute is missing. */
int vd_info_checkpoint(hid_t file, const char *path, vd_error *err);

#endif
