/* Lines that `viaduct info` prints for several kinds of files. */
#ifndef VD_INFO_PRINT_H
#define VD_INFO_PRINT_H

#include "io/h5.h"

/* Not collective. The caller holds the HDF5 lock. Prints a text attribute of `file` as "  LABEL    VALUE".
 * VD_FAILED when there is none. */
int vd_info_text(hid_t file, const char *attribute, const char *label, vd_error *err);
/* Not collective. The caller holds the HDF5 lock. The same for an attribute that files of earlier versions lack: prints
 * nothing where there is none. */
int vd_info_optional_text(hid_t file, const char *attribute, const char *label, vd_error *err);
/* Not collective. The caller holds the HDF5 lock. Prints the settings that `file` holds, indented. VD_FAILED when it
 * holds none. */
int vd_info_settings(hid_t file, vd_error *err);
/* Not collective. The caller holds the HDF5 lock. Puts the shape of an open dataset, "[64, 512]" or "scalar", into
 * text [96]; returns the number of its elements. */
int64_t vd_info_shape(hid_t id, char *text);

#endif
