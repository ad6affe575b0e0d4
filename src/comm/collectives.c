#include "src/comm/collectives.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum { VD_CHUNK = 1 << 26 }; /* elements in one MPI call: counts are int, and a chunk bounds MPI's own buffers */

void vd_all_reduce_reals(MPI_Comm comm, real *x, size_t n) {
  int size;
  MPI_Comm_size(comm, &size);
  if (size == 1) return;
  for (size_t i = 0; i < n; i += VD_CHUNK) {
    int count = (int)(n - i < VD_CHUNK ? n - i : VD_CHUNK);
    MPI_Allreduce(MPI_IN_PLACE, x + i, count, VD_MPI_REAL, MPI_SUM, comm);
  }
}

void vd_reduce_scatter_reals(MPI_Comm comm, const real *x, size_t chunk, real *own) {
  MPI_Reduce_scatter_block(x, own, (int)chunk, VD_MPI_REAL, MPI_SUM, comm);
}

void vd_all_gather_reals(MPI_Comm comm, real *x, size_t chunk) {
  MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, x, (int)chunk, VD_MPI_REAL, comm);
}

void vd_all_reduce_doubles(MPI_Comm comm, double *x, int n) {
  MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, comm);
}

void vd_broadcast_reals(MPI_Comm comm, int root, real *x, size_t n) {
  for (size_t i = 0; i < n; i += VD_CHUNK) {
    int count = (int)(n - i < VD_CHUNK ? n - i : VD_CHUNK);
    MPI_Bcast(x + i, count, VD_MPI_REAL, root, comm);
  }
}

int vd_agree(MPI_Comm comm, vd_error *err) {
  int rank, size;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  int mine[2] = {err->status, err->status == VD_OK ? size : rank};
  int worst, first;
  MPI_Allreduce(&mine[0], &worst, 1, MPI_INT, MPI_MAX, comm);
  MPI_Allreduce(&mine[1], &first, 1, MPI_INT, MPI_MIN, comm);
  if (worst == VD_OK) return VD_OK;
  if (first == size) vd_bug("ranks failed without a status");
  int failed = err->status != VD_OK, n_failed;
  MPI_Allreduce(&failed, &n_failed, 1, MPI_INT, MPI_SUM, comm);
  if (rank == first && n_failed < size) vd_wrap(err, "rank %d of %d", rank, size);
  MPI_Bcast(err->message, (int)sizeof err->message, MPI_CHAR, first, comm);
  err->status = worst;
  return worst;
}

int vd_broadcast_error(MPI_Comm comm, vd_error *err) {
  MPI_Bcast(&err->status, 1, MPI_INT, 0, comm);
  if (err->status != VD_OK) MPI_Bcast(err->message, (int)sizeof err->message, MPI_CHAR, 0, comm);
  return err->status;
}

void vd_end_other_ranks(MPI_Comm comm, vd_error *err) {
  int rank, size;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  if (size == 1) return;
  vd_wrap(err, "rank %d, whose all-reduce the other ranks wait for", rank);
  vd_error_print(err);
  MPI_Abort(comm, VD_FAILED);
}

void vd_local_rank(MPI_Comm comm, int *rank, int *size) {
  MPI_Comm node;
  MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  MPI_Comm_rank(node, rank);
  MPI_Comm_size(node, size);
  MPI_Comm_free(&node);
}

int vd_threads(MPI_Comm comm, int64_t asked) {
  MPI_Comm node;
  int size;
  MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  MPI_Comm_size(node, &size);
  cpu_set_t own, all;
  CPU_ZERO(&own);
  if (sched_getaffinity(0, sizeof own, &own) != 0) CPU_SET(0, &own);
  /* Launchers either bind each rank to cores of its own or leave all ranks on all cores: the masks together tell. */
  MPI_Allreduce(&own, &all, (int)sizeof all, MPI_BYTE, MPI_BOR, node);
  MPI_Comm_free(&node);
  if (asked > 0) return (int)asked;
  const char *text = getenv("OMP_NUM_THREADS");
  int set = text ? atoi(text) : 0;
  if (set > 0) return set;
  int share = CPU_COUNT(&all) / size, mine = CPU_COUNT(&own);
  if (share > mine) share = mine;
  return share < 1 ? 1 : share;
}

void vd_same_on_all(MPI_Comm comm, int64_t value, const char *what) {
#ifdef NDEBUG
  (void)comm, (void)value, (void)what;
#else
  int64_t mine[2] = {value, -value}, most[2];
  MPI_Allreduce(mine, most, 2, MPI_INT64_T, MPI_MAX, comm);
  if (most[0] != -most[1])
    vd_bug("ranks disagree on %s: %lld here, from %lld to %lld", what, (long long)value, (long long)-most[1],
           (long long)most[0]);
#endif
}
