/* `viaduct info DIRECTORY`: the folder of a run. */
#ifndef VD_INFO_RUN_H
#define VD_INFO_RUN_H

#include "src/base/error.h"

/* Not collective. Describes the run in `directory` on standard output: its deck, its checkpoints and trace, whose
 * digests are compared, and what its log says last. VD_FAILED, after all is printed, naming the first file that is
 * damaged; at once where the folder is not a run's. */
int vd_info_run(const char *directory, vd_error *err);

#endif
