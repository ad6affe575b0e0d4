/* A table of ops that times another: every op of a training update between two CUDA events in the backend's stream,
 * beside its floor, the least time that its operations and bytes take. */
#ifndef VD_OP_TIMES_H
#define VD_OP_TIMES_H

#include "src/ops/cuda_plugin.h"

/* Not collective. Wraps `inner`, a table that cuda->ops made. destroy() of what is returned destroys both. */
vd_ops *op_times_wrap(vd_ops *inner, const vd_cuda_plugin *cuda);
/* Not collective. Ends an update: waits, and reads its events. Nothing is timed before the first call. */
void op_times_update(vd_ops *o);
/* Not collective. Prints, to stdout, for each kind of op: calls an update, ms (the median over updates) and floors. */
void op_times_print(const vd_ops *o);

#endif
