/* Sums over rows that only backward_end has to complete: gradients of layer norms and of the biases of hidden units.
 * Their kernels leave partial rows, and one kernel adds up those of several layers. A launch costs the host 3 us: with
 * few streams an update waits for its launches. */
#ifndef VD_CUDA_ROW_SUMS_H
#define VD_CUDA_ROW_SUMS_H

#include "cuda/backend/context.h"

/* Stream-ordered. Device memory [rows, width] for the partial rows of a sum that vd_cuda_row_sum_later() takes next.
 * Where there is no space left, the sums so far are completed first. NULL and a recorded error: out of memory. */
float *vd_cuda_row_partials(vd_cuda_backend *c, int64_t rows, int64_t width);
/* Stream-ordered. to[v][c] += the sum of column v * d + c of partial [rows, stride], v < n_vector <= 3, c < d. The
 * kernel that writes partial is enqueued on the main stream, which has waited for the zeroing of the gradients
 * (gradient_stream.h). The sum is completed by vd_cuda_row_sums_complete() or before; until then `to[v]` must stay. */
void vd_cuda_row_sum_later(vd_cuda_backend *c, const float *partial, int64_t rows, int64_t stride, int64_t d,
                           int n_vector, real *const *to);
/* Stream-ordered. Completes all sums. */
void vd_cuda_row_sums_complete(vd_cuda_backend *c);

#endif
