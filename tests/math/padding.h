/* What lies between the tensors of an arena, where the output layer has rows beyond the vocabulary. */
#ifndef VD_PADDING_H
#define VD_PADDING_H

#include "src/model/model.h"

#include <stdlib.h>
#include <string.h>

/* Not collective. How many elements of the padding are not zero; arena: host memory, parameters or gradients. The
 * spans' padding is left out: it gets the penalty's gradient and is clamped with them. */
static inline size_t padding_not_zero(const vd_model *m, const real *arena) {
  const size_t n = vd_model_arena(m);
  size_t count = 0;
  bool *of_tensor = vd_calloc(n, sizeof *of_tensor);
  for (int i = 0; i < vd_model_n_param(m); i++) {
    vd_extent at = vd_model_param(m, i)->at;
    memset(of_tensor + at.offset, true, at.size * sizeof *of_tensor);
  }
  for (size_t i = vd_model_span_extent(m); i < n; i++) count += !of_tensor[i] && arena[i] != 0;
  free(of_tensor);
  return count;
}

#endif
