/* See row_sums.h. */
#include "cuda/backend/row_sums.h"

/* Three layers of 16 streams or more. All of a 12-layer model's would take 48 MB and save three launches more. */
enum { VD_ROW_SUM_BYTES = 12 << 20, ALIGNED = 256 };

float *vd_cuda_row_partials(vd_cuda_backend *c, int64_t rows, int64_t width) {
  vd_row_sums *s = &c->row_sums;
  const size_t bytes = (size_t)(rows * width) * sizeof(float);
  const size_t space = bytes < VD_ROW_SUM_BYTES ? VD_ROW_SUM_BYTES : bytes;
  if (s->n == VD_ROW_SUMS || s->used + bytes > s->partial.bytes) vd_cuda_row_sums_complete(c);
  char *p = vd_cuda_workspace(c, &s->partial, space);
  return p ? (float *)(void *)(p + s->used) : NULL;
}

/* A launch adds to each vector once, since its blocks do not wait for each other. */
static bool is_pending(const vd_row_sums *s, const real *to) {
  for (int i = 0; i < s->n; i++)
    if (s->sum[i].to[0] == to || s->sum[i].to[1] == to || s->sum[i].to[2] == to) return true;
  return false;
}

void vd_cuda_row_sum_later(vd_cuda_backend *c, const float *partial, int64_t rows, int64_t stride, int64_t d,
                           int n_vector, real *const *to) {
  vd_row_sums *s = &c->row_sums;
  for (int i = 0; i < n_vector; i++)
    if (is_pending(s, to[i])) vd_cuda_row_sums_complete(c);
  vd_row_sum *sum = &s->sum[s->n++];
  *sum = (vd_row_sum){
      .partial = partial, .rows = (int32_t)rows, .stride = (int32_t)stride, .d = (int32_t)d, .n_vector = n_vector};
  for (int i = 0; i < n_vector; i++) sum->to[i] = to[i];
  const size_t used = (size_t)((const char *)(partial + rows * stride) - (const char *)s->partial.p);
  s->used = (used + ALIGNED - 1) / ALIGNED * ALIGNED;
}

void vd_cuda_row_sums_complete(vd_cuda_backend *c) {
  vd_row_sums *s = &c->row_sums;
  if (s->n > 0) vd_cuda_record_error(c, vd_cuda_add_row_sums(s->n, s->sum, c->stream), "sums over rows");
  s->n = 0;
  s->used = 0;
}
