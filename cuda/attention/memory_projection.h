/* Keys and values of a layer's memory on a GPU, only as far back as each head reaches: a head with a short span needs
 * them for a few of the rows that the longest head needs. The reaches are those of the schedule, on the device, so that
 * the host reads nothing, the launches are always the same, and the cost follows the sum of the heads' reaches.
 */
#ifndef VD_CUDA_PROJECT_H
#define VD_CUDA_PROJECT_H

#include "cuda/attention/attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A layer's memory, device memory [n_stream, rows, d], d = n_head * d_head: of each stream row `oldest` is the oldest,
 * and row 0 follows the last one. The last row of the window is the newest of them. */
typedef struct vd_cuda_ring {
  const void *at;
  int64_t rows, oldest;
} vd_cuda_ring;

/* Stream-ordered. Keys and values of the memory, kv as attention.h has it: for head h and rows r = window -
 * min(reach[h], memory->rows) .. window - 1 of each stream, its columns become those of memory W_k^T and memory W_v^T;
 * nothing else is written. Where a->trimmed, values are written only within the head's own span (vd_band.own). wk and
 * wv [d, d] are [out, in], row-major. All are device memory of the activation type, aligned to 16 bytes. a->schedule
 * must have been made. Returns cudaErrorInvalidValue for shapes that the attention does not take.
 */
cudaError_t vd_cuda_project_memory(const vd_cuda_attention *a, const vd_cuda_ring *memory, const void *wk,
                                   const void *wv, void *kv, cudaStream_t stream);

/* Not collective. Bytes of scratch memory that vd_cuda_project_memory_backward needs (partial sums over rows). Depends
 * on n_head, d_head and trimmed alone. */
size_t vd_cuda_project_workspace_size(const vd_cuda_attention *a);

/* Stream-ordered. Adds to dwk and dwv [d, d] (fp32): rows of head h += its columns of dkv^T memory, summed over all
 * streams and the rows that vd_cuda_project_memory writes for that head; others may hold anything, NaN included. Sums
 * are fp32 in a fixed order: the same input gives the same bits. dkv has the layout of kv; `workspace` is
 * vd_cuda_project_workspace_size() bytes, free again when the stream has passed. Errors as above. */
cudaError_t vd_cuda_project_memory_backward(const vd_cuda_attention *a, const vd_cuda_ring *memory, const void *dkv,
                                            float *dwk, float *dwv, void *workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
