/* What the two kinds of golden files share: reading them, and comparing with a tolerance. Part of check_golden. */
#ifndef VD_GOLDEN_H
#define VD_GOLDEN_H

#include "model.h"
#include "optimizer.h"

#include <hdf5.h>

/* check_golden_f32 links the float library that ships. */
static const double VD_GOLDEN_TOLERANCE = VD_REAL_IS_DOUBLE ? 1e-9 : 1e-5;

typedef struct vd_golden {
  const char *path;
  hid_t file;
  vd_model_config config;
  vd_optimizer_config optimizer;
  int64_t n_stream, block, n_step;
  int32_t *x, *y; /* [n_step][n_stream][block] */
  bool failed;
} vd_golden;

/* Not collective. A numeric attribute of a file or group; exit 2 where there is none. */
double vd_golden_attribute(hid_t at, const char *name);
/* Not collective. A whole dataset as doubles; its element count in *n and shape in shape[4]. Caller frees. Exit 2 where
 * there is none. */
double *vd_golden_dataset(hid_t file, const char *path, size_t *n, hsize_t shape[4]);
/* Not collective. The largest |ours - theirs| over the largest |theirs|; a NaN stays. */
double vd_golden_difference(const real *ours, const double *theirs, size_t n);
/* Not collective. Prints a line; notes in *g where the error is above the tolerance. */
void vd_golden_report(vd_golden *g, const char *what, double error, double tolerance);
/* Not collective. Compares every tensor of `group` with an arena on the host. */
void vd_golden_compare_arena(vd_golden *g, vd_model *m, const char *group, const real *arena);
/* Not collective. Fills the parameters of m (CPU backend) from a group. */
void vd_golden_load(vd_golden *g, vd_model *m, const char *group);
/* Not collective. Replays a file of model 'transformer_xl', g->file open; false where something is off. */
bool vd_golden_check_xl(vd_golden *g);

#endif
