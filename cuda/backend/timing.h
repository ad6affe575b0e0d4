/* Timing events in the backend's stream, for programs that time ops: event_record and event_elapsed of the plugin. */
#ifndef VD_CUDA_TIMING_H
#define VD_CUDA_TIMING_H

#include "cuda/backend/context.h"

/* Stream-ordered. vd_cuda_plugin.event_record. */
void vd_cuda_event_record(vd_ops *o, int i);
/* Not collective. vd_cuda_plugin.event_elapsed. */
double vd_cuda_event_elapsed(vd_ops *o, int i, int j);
/* Not collective. Destroys the timing events. */
void vd_cuda_timing_end(vd_cuda_backend *c);

#endif
