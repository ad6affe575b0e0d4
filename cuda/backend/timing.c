/* See timing.h. The array of events grows on demand. */
#include "cuda/backend/timing.h"

#include "cuda/backend/gradient_stream.h"

#include <stdlib.h>

void vd_cuda_event_record(vd_ops *o, int i) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (i >= c->n_event) {
    int n = 2 * i + 64;
    cudaEvent_t *event = vd_calloc((size_t)n, sizeof(cudaEvent_t));
    for (int k = 0; k < n; k++) {
      if (k < c->n_event)
        event[k] = c->event[k];
      else
        vd_cuda_record_error(c, cudaEventCreate(&event[k]), "creating a timing event");
    }
    free(c->event);
    c->event = event;
    c->n_event = n;
  }
  c->one_stream = true;
  vd_cuda_gradient_join(c);
  vd_cuda_record_error(c, cudaEventRecord(c->event[i], c->stream), "recording a timing event");
}

double vd_cuda_event_elapsed(vd_ops *o, int i, int j) {
  vd_cuda_backend *c = vd_cuda_of(o);
  float ms = 0;
  cudaError_t e = cudaEventSynchronize(c->event[j]);
  if (e == cudaSuccess) e = cudaEventElapsedTime(&ms, c->event[i], c->event[j]);
  vd_cuda_record_error(c, e, "reading timing events");
  return (double)ms;
}

void vd_cuda_timing_end(vd_cuda_backend *c) {
  for (int i = 0; i < c->n_event; i++) cudaEventDestroy(c->event[i]);
  free(c->event);
}
