/* The gradient stream: products of weight gradients, which nothing of the backward pass waits for, run beside the main
 * stream's kernels, many of which do not fill the GPU.
 *
 * An op forks, enqueues work on the gradient stream, and ends it as a job that names the buffer that the job reads and
 * that a later op will write: the gradient of an activation. Ops that write such buffers wait for the jobs that read
 * them. Jobs run in order, so that sums into one gradient have one order. */
#ifndef VD_CUDA_GRADIENT_STREAM_H
#define VD_CUDA_GRADIENT_STREAM_H

#include "cuda/backend/context.h"

/* Not collective. Creates the stream and its events; vd_cuda_gradient_end() also frees what a failure left. */
cudaError_t vd_cuda_gradient_create(vd_cuda_backend *c);
/* Not collective. Destroys them; waits for the stream. */
void vd_cuda_gradient_end(vd_cuda_backend *c);

/* Stream-ordered. The stream for work on gradients; it waits for what is on the main stream now. */
cudaStream_t vd_cuda_gradient_fork(vd_cuda_backend *c);
/* Stream-ordered. Ends a job: what was enqueued on the gradient stream since the fork. `reads`: the buffer that it
 * reads and that an op may write; NULL: every op of a backward pass waits for the job. */
void vd_cuda_gradient_job(vd_cuda_backend *c, const void *reads);
/* Stream-ordered. The main stream waits for the jobs that read `buffer`, and for those that every op waits for: to be
 * called before an op of a backward pass writes the buffer. */
void vd_cuda_gradient_release(vd_cuda_backend *c, const void *buffer);
/* Stream-ordered. The main stream waits for all jobs, and sums over rows are completed: what is left to
 * backward_end is the key table's gradient. */
void vd_cuda_gradient_join(vd_cuda_backend *c);
/* Stream-ordered. `stream` waits for all jobs; the main stream does not. */
cudaError_t vd_cuda_gradient_wait(vd_cuda_backend *c, cudaStream_t stream);

/* Stream-ordered. vd_ops.zero_gradients. */
void vd_cuda_zero_gradients(vd_ops *o, real *gradients, size_t n);

#endif
