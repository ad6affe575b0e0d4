/* One update of the 12-layer model at spans of many lengths, and the distance of its gradients on two backends. */
#ifndef VD_TEST_UPDATE_CASE_H
#define VD_TEST_UPDATE_CASE_H

#include "src/model/model.h"

/* Results of an update: the mean nll in nats, and the gradients, host [vd_model_arena], to be freed. */
typedef struct update_outcome {
  double nll;
  real *gradient;
} update_outcome;

/* Changes of the initial parameters. */
typedef struct update_change {
  double noise; /* each parameter but the spans is moved by up to this share of its size */
  bool clear;   /* every hidden unit is kept clear of the ReLU's edge, half of them on, half off */
} update_change;

/* Bounds of the difference of two updates: the loss, the median over the tensors, each tensor; relative. */
typedef struct update_bounds {
  double loss, median, each;
} update_bounds;

/* Not collective. The model that is compared: "masked", "trimmed", "transformer_xl". Heads are
 * 64 wide; d_model is a multiple of that, at most 64 VD_CUDA_MAX_HEADS. */
vd_model_config update_model(const char *model, int64_t n_layer, int64_t d_model);
/* Not collective. A block that fills the memories of `n_stream` streams, then an update's gradients on the next. Every
 * parameter is rounded to float before. */
int update_run(vd_ops *o, const vd_model_config *config, int64_t n_stream, const update_change *change,
               update_outcome *out, vd_error *err);
/* Not collective. Prints a line for the loss, each tensor and the median, b against a, `what` before it; returns how
 * many are out of bounds. `cpu` serves for the names. */
int update_compare(vd_ops *cpu, const vd_model_config *config, const char *what, const update_outcome *a,
                   const update_outcome *b, const update_bounds *bounds);

#endif
