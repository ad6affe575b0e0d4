/* The attention of vd_ops: tile schedules, tables of relative keys, dropout masks, projections. */
#ifndef VD_CUDA_ATTENTION_OPS_H
#define VD_CUDA_ATTENTION_OPS_H

#include "cuda/backend/context.h"

/* Stream-ordered. vd_ops.attention_schedule: makes the layers' tile schedules. */
void vd_cuda_attention_schedule_op(vd_ops *o, int n, const vd_attention *a);
/* Not collective. Parameters have changed, or memory was freed: invalidates tile schedules and the key table. */
void vd_cuda_attention_changed(vd_cuda_backend *c);
/* Stream-ordered. vd_ops.attention_project. */
void vd_cuda_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                               const real *wk, const real *wv, const vd_qkv *qkv);
/* Stream-ordered. vd_ops.attention_project_backward. */
void vd_cuda_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                        const real *wk, const real *wv, const vd_qkv *dqkv, vd_act *dhidden, real *dwq,
                                        real *dwk, real *dwv);
/* Stream-ordered. vd_ops.attention. */
void vd_cuda_attention_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, vd_act *out, real *lse);
/* Stream-ordered. vd_ops.attention_backward. */
void vd_cuda_attention_backward_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, const vd_act *out,
                                   const real *lse, const vd_act *dout, const vd_qkv *dqkv, real *dkey_pe, real *dspan);
/* Stream-ordered. vd_ops.backward_end. */
void vd_cuda_backward_end(vd_ops *o);
/* Not collective. Frees tile schedules, dropout masks and the key table. */
void vd_cuda_attention_end(vd_cuda_backend *c);

#endif
