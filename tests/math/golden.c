#include "tests/math/golden.h"

#if !VD_REAL_IS_DOUBLE
#include "tests/gpu/gpu_ops.h"
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

double vd_golden_attribute(hid_t at, const char *name) {
  double value = 0;
  hid_t a = H5Aopen(at, name, H5P_DEFAULT);
  if (a < 0 || H5Aread(a, H5T_NATIVE_DOUBLE, &value) < 0) {
    fprintf(stderr, "check_golden: no numeric attribute '%s'\n", name);
    exit(2);
  }
  H5Aclose(a);
  return value;
}

double *vd_golden_dataset(hid_t file, const char *path, size_t *n, hsize_t shape[4]) {
  hid_t d = H5Dopen2(file, path, H5P_DEFAULT);
  if (d < 0) {
    fprintf(stderr, "check_golden: no dataset '%s'\n", path);
    exit(2);
  }
  hid_t space = H5Dget_space(d);
  *n = (size_t)H5Sget_simple_extent_npoints(space);
  H5Sget_simple_extent_dims(space, shape, NULL);
  double *data = vd_calloc(*n, sizeof *data);
  if (H5Dread(d, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0) exit(2);
  H5Sclose(space);
  H5Dclose(d);
  return data;
}

double vd_golden_worse(double worst, double error) {
  return isnan(worst) || error <= worst ? worst : error;
}

double vd_golden_difference(const real *ours, const double *theirs, size_t n) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < n; i++) {
    worst = vd_golden_worse(worst, fabs((double)ours[i] - theirs[i]));
    largest = fmax(largest, fabs(theirs[i]));
  }
  return worst == 0 ? 0 : worst / fmax(largest, 1e-300);
}

#if VD_REAL_IS_DOUBLE
int vd_golden_ops(const vd_golden *g, vd_ops **ops, vd_error *err) {
  if (g->gpu) return vd_fail(err, VD_USAGE, "no GPU computes in double: use check_golden_f32");
  return vd_ops_cpu(ops, 1, err);
}
#else
int vd_golden_ops(const vd_golden *g, vd_ops **ops, vd_error *err) {
  if (!g->gpu) return vd_ops_cpu(ops, 1, err);
  const vd_cuda_plugin *table = gpu_table(err);
  return table ? table->ops(ops, 0, VD_FP32, err) : err->status;
}
#endif

real *vd_golden_host(vd_ops *ops, const real *x, size_t n) {
  real *host = vd_calloc(n, sizeof *host);
  ops->get(ops, host, x, n);
  return host;
}

void vd_golden_report(vd_golden *g, const char *what, double error, double tolerance) {
  bool good = error <= tolerance;
  printf("  %-18s largest relative error %.3g (tolerance %.0e)%s\n", what, error, tolerance, good ? "" : "  FAILED");
  if (!good) g->failed = true;
}

/* Biases that all layers share stand in a file under the model's name, the published code's, or the first layer's. */
static void tensor_path(const vd_golden *g, const char *group, const char *name, char path[160]) {
  bool shared = strcmp(name, "r_w") == 0 || strcmp(name, "r_r") == 0;
  static const char *const forms[] = {"%s/%s", "%s/%s_bias", "%s/layers.0.%s"};
  for (int i = 0; i < (shared ? 3 : 1); i++) {
    snprintf(path, 160, forms[i], group, name);
    if (H5Lexists(g->file, path, H5P_DEFAULT) > 0) return;
  }
}

/* The file's tensor of that parameter, of its size; to be freed. */
static double *tensor_of(vd_golden *g, const char *group, const vd_param *p) {
  char path[160];
  size_t n;
  hsize_t shape[4];
  tensor_path(g, group, p->name, path);
  double *data = vd_golden_dataset(g->file, path, &n, shape);
  if (n != p->at.size) {
    fprintf(stderr, "check_golden: %s: %zu elements, expected %zu\n", path, n, p->at.size);
    exit(2);
  }
  return data;
}

void vd_golden_compare_arena(vd_golden *g, vd_ops *ops, vd_model *m, const char *group, const real *arena) {
  real *ours = vd_golden_host(ops, arena, vd_model_arena(m));
  double worst = 0;
  char where[160] = "";
  for (int i = 0; i < vd_model_n_param(m); i++) {
    const vd_param *p = vd_model_param(m, i);
    double *theirs = tensor_of(g, group, p);
    double before = worst;
    worst = vd_golden_worse(worst, vd_golden_difference(ours + p->at.offset, theirs, p->at.size));
    if (worst != before && !isnan(before)) snprintf(where, sizeof where, "%s", p->name);
    free(theirs);
  }
  vd_golden_report(g, group, worst, g->tolerance);
  if (!(worst <= g->tolerance)) printf("    worst in %s\n", where);
  free(ours);
}

void vd_golden_load(vd_golden *g, vd_ops *ops, vd_model *m, const char *group) {
  real *host = vd_golden_host(ops, vd_model_params(m), vd_model_arena(m));
  for (int i = 0; i < vd_model_n_param(m); i++) {
    const vd_param *p = vd_model_param(m, i);
    double *data = tensor_of(g, group, p);
    for (size_t e = 0; e < p->at.size; e++) host[p->at.offset + e] = (real)data[e];
    free(data);
  }
  ops->put(ops, vd_model_params(m), host, vd_model_arena(m));
  free(host);
  vd_model_params_changed(m);
}
