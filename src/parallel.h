/* What ranks do together: the gradient sum, scalars, who sits where. */
#ifndef VD_PARALLEL_H
#define VD_PARALLEL_H

#include "context.h"
#include "ops.h"

/* Collective(comm). Sums x [n] (host memory; the CPU backend's memory is) over the ranks, in place, in a fixed order
 * for a given number of ranks. */
void vd_sum_reals(MPI_Comm comm, real *x, size_t n);
/* Collective(comm). Sums n doubles in place. */
void vd_sum_doubles(MPI_Comm comm, double *x, int n);
/* Collective(comm). Rank within its node, and ranks of the node. */
void vd_local_rank(MPI_Comm comm, int *rank, int *size);
/* Collective(comm). In debug builds: every rank must pass the same value; a bug otherwise. No-op with NDEBUG. */
void vd_same_on_all(MPI_Comm comm, int64_t value, const char *what);

#endif
