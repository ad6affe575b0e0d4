/* Collectives over the ranks of a run: all-reduce, broadcast, agreement on errors, placement of ranks on nodes. */
#ifndef VD_COLLECTIVES_H
#define VD_COLLECTIVES_H

#include "src/base/real.h"
#include "src/comm/context.h"

#include <stddef.h>
#include <stdint.h>

#define VD_MPI_REAL (VD_REAL_IS_DOUBLE ? MPI_DOUBLE : MPI_FLOAT)

/* Collective(comm). Sums x [n] (host memory; the CPU backend's memory is) over the ranks, in place, in a fixed order
 * for a given number of ranks. All ranks get the same bits, so that their parameters stay equal. */
void vd_all_reduce_reals(MPI_Comm comm, real *x, size_t n);
/* Collective(comm). Sums x [ranks * chunk] (host memory) over the ranks in a fixed order for a given number of ranks,
 * and writes the sums of this rank's chunk, elements rank * chunk and on, to own [chunk]. x and own do not overlap;
 * chunk fits an int. */
void vd_reduce_scatter_reals(MPI_Comm comm, const real *x, size_t chunk, real *own);
/* Collective(comm). In place, the reverse: x [ranks * chunk] (host memory) gets each rank's chunk from that rank. */
void vd_all_gather_reals(MPI_Comm comm, real *x, size_t chunk);
/* Collective(comm). Sums n doubles in place; all ranks get the same bits. */
void vd_all_reduce_doubles(MPI_Comm comm, double *x, int n);
/* Collective(comm). Broadcasts x [n] reals from rank `root`; n may exceed an int. */
void vd_broadcast_reals(MPI_Comm comm, int root, real *x, size_t n);
/* Collective(comm). Agrees on an error. Every rank passes its own *err. When any rank failed, all ranks return the
 * largest status and hold the message of the lowest failing rank, prefixed with its number unless all ranks failed.
 * VD_OK on all ranks otherwise. */
int vd_agree(MPI_Comm comm, vd_error *err);
/* Collective(comm). All ranks get rank 0's *err; returns its status. For work that rank 0 alone did, where no other
 * rank can have failed: the message is not prefixed with a rank, as vd_agree would. */
int vd_broadcast_error(MPI_Comm comm, vd_error *err);
/* Not collective. *err is of this rank alone, and the other ranks may wait in an all-reduce that it never completes,
 * where no message reaches them: prints the reason and ends all ranks (MPI_Abort). Alone it returns, and *err is as it
 * was. */
void vd_end_other_ranks(MPI_Comm comm, vd_error *err);
/* Collective(comm). *rank: rank within its node (of those that share memory); *size: ranks of the node. */
void vd_local_rank(MPI_Comm comm, int *rank, int *size);
/* Collective(comm). OpenMP threads for this rank. asked > 0: that many. Else OMP_NUM_THREADS where it is set. Else the
 * cores that the ranks of the node may run on (their affinity masks together) divided by those ranks, at most the
 * rank's own cores, at least 1. */
int vd_threads(MPI_Comm comm, int64_t asked);
/* Collective(comm). In debug builds: every rank must pass the same value; a bug otherwise. No-op with NDEBUG. */
void vd_same_on_all(MPI_Comm comm, int64_t value, const char *what);

#endif
