/* What writing and reading a snapshot share; nobody else includes this. */
#ifndef VD_SNAPSHOT_INTERNAL_H
#define VD_SNAPSHOT_INTERNAL_H

#include "io/h5.h"
#include "src/train/snapshot.h"

/* Numbers of a checkpoint: each a scalar dataset GROUP/NAME. In files of format versions 1 and 2 GROUP is an array of
 * them in this order. */
typedef struct vd_snapshot_number {
  const char *name;
  enum vd_dtype dtype; /* VD_I64 or VD_F64 */
  size_t offset;       /* of an int64_t or a double in vd_snapshot_numbers */
  const char *units, *long_name;
} vd_snapshot_number;
typedef struct vd_snapshot_group {
  const char *path;
  enum vd_dtype array_dtype; /* of the array in files of format versions 1 and 2 */
  int n;
  const vd_snapshot_number *number; /* [n] */
} vd_snapshot_group;
enum { VD_GROUP_POSITION, VD_GROUP_STATISTICS, VD_GROUP_LOSS_SCALE, VD_N_GROUP };
extern const vd_snapshot_group vd_snapshot_groups[VD_N_GROUP];

enum { PIECE_BYTES = 16 << 20 /* of memories that travel at once */ };
static const enum vd_dtype vd_snapshot_dtype = VD_REAL_IS_DOUBLE ? VD_F64 : VD_F32;

/* Not collective. Streams whose memories of `rows` rows travel at once. */
static inline int64_t vd_snapshot_piece(const vd_snapshot *s, int64_t rows) {
  int64_t bytes = rows * vd_model_config_of(s->model)->d_model * (int64_t)sizeof(real);
  return bytes > 0 && bytes < PIECE_BYTES ? PIECE_BYTES / bytes : 1;
}

#endif
