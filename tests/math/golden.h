/* What the two kinds of golden files share: reading them, and comparing with a tolerance. Part of check_golden. */
#ifndef VD_GOLDEN_H
#define VD_GOLDEN_H

#include "src/model/model.h"
#include "src/model/optimizer.h"

#include <hdf5.h>

typedef struct vd_golden {
  const char *path;
  bool gpu;         /* replayed by the CUDA backend in fp32 */
  double tolerance; /* double: 1e-9; check_golden_f32, the float library that ships: 1e-5, on a GPU 1e-4 */
  hid_t file;
  vd_model_config config;
  vd_optimizer_config optimizer;
  int64_t n_stream, block, n_step;
  int32_t *x, *y; /* [n_step][n_stream][block] */
  bool failed;
} vd_golden;

/* Not collective. The backend that g asks for. Free with (*ops)->destroy(*ops). */
int vd_golden_ops(const vd_golden *g, vd_ops **ops, vd_error *err);
/* Not collective. An arena or a part of it on the host, n reals. Caller frees. */
real *vd_golden_host(vd_ops *ops, const real *x, size_t n);
/* Not collective. A numeric attribute of a file or group; exit 2 where there is none. */
double vd_golden_attribute(hid_t at, const char *name);
/* Not collective. A whole dataset as doubles; its element count in *n and shape in shape[4]. Caller frees. Exit 2 where
 * there is none. */
double *vd_golden_dataset(hid_t file, const char *path, size_t *n, hsize_t shape[4]);
/* Not collective. The larger of two errors; a NaN in either stays. */
double vd_golden_worse(double worst, double error);
/* Not collective. The largest |ours - theirs| over the largest |theirs|; a NaN stays. */
double vd_golden_difference(const real *ours, const double *theirs, size_t n);
/* Not collective. Prints a line; notes in *g where the error is above the tolerance. */
void vd_golden_report(vd_golden *g, const char *what, double error, double tolerance);
/* Not collective. Compares every tensor of `group` with an arena in the backend's memory. */
void vd_golden_compare_arena(vd_golden *g, vd_ops *ops, vd_model *m, const char *group, const real *arena);
/* Not collective. Fills the parameters of m from a group. */
void vd_golden_load(vd_golden *g, vd_ops *ops, vd_model *m, const char *group);
/* Not collective. Replays a file of model 'transformer_xl', g->file open; false where something is off. */
bool vd_golden_check_xl(vd_golden *g);

#endif
