/* Keys and values of memory rows, each head's only as far back as it reaches: the cost is the sum of the reaches. In
 * bf16 and fp16; fp32 goes through cuBLASLt (attention_ops.c). */
#ifndef VD_CUDA_MEMORY_ROWS_H
#define VD_CUDA_MEMORY_ROWS_H

#include "attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One layer. Pointers are device memory of `type`; d = n_head * d_head = columns of memory, k, v and of the weights,
 * d_head a multiple of 8. */
typedef struct vd_cuda_projection {
  enum vd_cuda_type type;
  int32_t n_stream, window, n_head, d_head;
  int64_t memory_rows;              /* of a stream; the newest `window` are the last ones */
  int64_t kv_rows;                  /* of a stream in k and v; row r is memory row memory_rows - window + r */
  int32_t reach[VD_CUDA_MAX_HEADS]; /* at most window */
} vd_cuda_projection;

/* Stream-ordered. For head h rows window - reach[h] .. window - 1 of its columns of k and v: memory times the
 * transposes of wk and wv [d, d]. */
cudaError_t vd_cuda_memory_rows(const vd_cuda_projection *p, const void *memory, const void *wk, const void *wv,
                                void *k, void *v, cudaStream_t stream);

/* Stream-ordered. dwk, dwv [d, d] += the transposes of those rows of dk and dv times memory. Pieces of a long head are
 * added by fp32 atomics: the last bits may differ from run to run. */
cudaError_t vd_cuda_memory_rows_backward(const vd_cuda_projection *p, const void *memory, const void *dk,
                                         const void *dv, float *dwk, float *dwv, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
