/* Checks a run for values that are not finite, for a loss that stalls at the entropy of single symbols, and for a loss
 * that rises again. */
#ifndef VD_MONITOR_H
#define VD_MONITOR_H

#include "src/model/model.h"

#include <mpi.h>

typedef struct vd_monitor vd_monitor;

/* Not collective. For a vocabulary of `vocab` symbols. */
vd_monitor *vd_monitor_create(int64_t vocab);
/* Not collective. NULL is allowed. */
void vd_monitor_destroy(vd_monitor *m);
/* Not collective. Counts the targets y [n] of this rank, -1 left out, for the entropy of single symbols. */
void vd_monitor_count(vd_monitor *m, const int32_t *y, int64_t n);
/* Collective(comm). Checks the mean bpc (bits per symbol) of the updates up to `update`; the same on all ranks.
 * warning [size] gets a warning, or "": for 200 updates bpc has been less than 0.1 above and less
 * than 0.5 below the entropy of single symbols and has not fallen by 0.1, or it has risen more than 1 above its lowest.
 * Each is given once until its condition ends. A bpc that is not finite is not checked. */
void vd_monitor_check(vd_monitor *m, MPI_Comm comm, int64_t update, double bpc, char *warning, size_t size);
/* Not collective. The first tensor of an arena (parameters or gradients, backend memory) with a value that is not
 * finite; NULL: none. */
const vd_param *vd_monitor_not_finite(const vd_model *m, vd_ops *ops, const real *arena);

#endif
