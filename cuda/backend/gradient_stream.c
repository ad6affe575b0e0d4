/* See gradient_stream.h. */
#include "cuda/backend/gradient_stream.h"

#include "cuda/backend/row_sums.h"

cudaError_t vd_cuda_gradient_create(vd_cuda_backend *c) {
  vd_gradient_stream *g = &c->gradient;
  int least = 0, greatest = 0;
  cudaError_t e = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  if (e == cudaSuccess) e = cudaStreamCreateWithPriority(&g->stream, cudaStreamNonBlocking, least);
  if (e == cudaSuccess) e = cudaEventCreateWithFlags(&g->fork, cudaEventDisableTiming);
  for (int i = 0; i < VD_GRADIENT_JOBS && e == cudaSuccess; i++)
    e = cudaEventCreateWithFlags(&g->job[i].done, cudaEventDisableTiming);
  return e;
}

void vd_cuda_gradient_end(vd_cuda_backend *c) {
  vd_gradient_stream *g = &c->gradient;
  if (g->stream) {
    cudaStreamSynchronize(g->stream);
    cudaStreamDestroy(g->stream);
  }
  if (g->fork) cudaEventDestroy(g->fork);
  for (int i = 0; i < VD_GRADIENT_JOBS; i++)
    if (g->job[i].done) cudaEventDestroy(g->job[i].done);
  cudaFree(g->blas_workspace.p);
  cudaFree(g->scratch.p);
  *g = (vd_gradient_stream){0};
}

static vd_gradient_job *pending(vd_gradient_stream *g, int i) {
  return &g->job[(g->first + i) % VD_GRADIENT_JOBS];
}

/* The main stream waits for the n oldest jobs: for the last of them, since they run in order. */
static void wait_for(vd_cuda_backend *c, int n) {
  vd_gradient_stream *g = &c->gradient;
  if (n == 0) return;
  vd_cuda_record_error(c, cudaStreamWaitEvent(c->stream, pending(g, n - 1)->done, 0), "waiting for weight gradients");
  g->first = (g->first + n) % VD_GRADIENT_JOBS;
  g->n -= n;
}

cudaStream_t vd_cuda_gradient_fork(vd_cuda_backend *c) {
  vd_gradient_stream *g = &c->gradient;
  if (c->one_stream) return c->stream;
  cudaError_t e = cudaEventRecord(g->fork, c->stream);
  if (e == cudaSuccess) e = cudaStreamWaitEvent(g->stream, g->fork, 0);
  vd_cuda_record_error(c, e, "forking the gradient stream");
  return g->stream;
}

void vd_cuda_gradient_job(vd_cuda_backend *c, const void *reads) {
  vd_gradient_stream *g = &c->gradient;
  if (c->one_stream) return;
  if (g->n == VD_GRADIENT_JOBS) wait_for(c, 1);
  vd_gradient_job *job = pending(g, g->n++);
  job->reads = reads;
  vd_cuda_record_error(c, cudaEventRecord(job->done, g->stream), "ending a weight gradient");
}

void vd_cuda_gradient_release(vd_cuda_backend *c, const void *buffer) {
  vd_gradient_stream *g = &c->gradient;
  for (int n = g->n; n > 0; n--)
    if (!pending(g, n - 1)->reads || pending(g, n - 1)->reads == buffer) {
      wait_for(c, n);
      return;
    }
}

void vd_cuda_gradient_join(vd_cuda_backend *c) {
  vd_cuda_row_sums_complete(c);
  wait_for(c, c->gradient.n);
}

cudaError_t vd_cuda_gradient_wait(vd_cuda_backend *c, cudaStream_t stream) {
  vd_gradient_stream *g = &c->gradient;
  if (g->n == 0) return cudaSuccess;
  return cudaStreamWaitEvent(stream, pending(g, g->n - 1)->done, 0);
}

void vd_cuda_zero_gradients(vd_ops *o, real *gradients, size_t n) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_row_sums_complete(c);
  cudaStream_t stream = vd_cuda_gradient_fork(c);
  vd_cuda_record_error(c, cudaMemsetAsync(gradients, 0, n * sizeof *gradients, stream), "zeroing gradients");
  vd_cuda_gradient_job(c, NULL);
}
