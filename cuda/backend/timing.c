/* Marks in the backend's stream, for who times ops from outside. */
#include "cuda/backend/timing.h"

#include <stdlib.h>

void vd_cuda_event_record(vd_ops *o, int i) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (i >= c->n_mark) {
    int n = 2 * i + 64;
    cudaEvent_t *mark = vd_calloc((size_t)n, sizeof(cudaEvent_t));
    for (int k = 0; k < n; k++) {
      if (k < c->n_mark)
        mark[k] = c->mark[k];
      else
        vd_cuda_record_error(c, cudaEventCreate(&mark[k]), "making a mark");
    }
    free(c->mark);
    c->mark = mark;
    c->n_mark = n;
  }
  vd_cuda_record_error(c, cudaEventRecord(c->mark[i], c->stream), "marking");
}

double vd_cuda_event_elapsed(vd_ops *o, int i, int j) {
  vd_cuda_backend *c = vd_cuda_of(o);
  float ms = 0;
  cudaError_t e = cudaEventSynchronize(c->mark[j]);
  if (e == cudaSuccess) e = cudaEventElapsedTime(&ms, c->mark[i], c->mark[j]);
  vd_cuda_record_error(c, e, "reading marks");
  return (double)ms;
}

void vd_cuda_timing_end(vd_cuda_backend *c) {
  for (int i = 0; i < c->n_mark; i++) cudaEventDestroy(c->mark[i]);
  free(c->mark);
}
