/* What writing and reading a snapshot share; nobody else includes this. */
#ifndef VD_SNAPSHOT_INTERNAL_H
#define VD_SNAPSHOT_INTERNAL_H

#include "io/h5.h"
#include "src/train/snapshot.h"

/* /statistics in this order. */
enum {
  BEST_BPC,
  BEST_UPDATE,
  VALID_UPDATE,
  LOG_NLL,
  LOG_TARGETS,
  LOG_SECONDS,
  TRACE_NLL,
  TRACE_TARGETS,
  TRACE_SECONDS,
  N_STATISTIC
};
enum { N_POSITION = 3, N_SCALING = 3, PIECE_BYTES = 16 << 20 /* of memories that travel at once */ };
static const enum vd_dtype vd_snapshot_dtype = VD_REAL_IS_DOUBLE ? VD_F64 : VD_F32;

/* Not collective. Streams whose memories of `rows` rows travel at once. */
static inline int64_t vd_snapshot_piece(const vd_snapshot *s, int64_t rows) {
  int64_t bytes = rows * vd_model_config_of(s->model)->d_model * (int64_t)sizeof(real);
  return bytes > 0 && bytes < PIECE_BYTES ? PIECE_BYTES / bytes : 1;
}

#endif
