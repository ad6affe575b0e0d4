/* The attention entries of the CPU backend's table of operations: see vd_attention and vd_ops in ops.h, where shapes,
 * ownership and equations stand. They return when the work is done; vd_bug() where a contract of ops.h is broken. */
#ifndef VD_CPU_ATTENTION_H
#define VD_CPU_ATTENTION_H

#include "src/ops/ops.h"

/* Stream-ordered. vd_ops.attention_project. */
void vd_cpu_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                              const real *wk, const real *wv, const vd_qkv *x);

/* Stream-ordered. vd_ops.attention_project_backward. */
void vd_cpu_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                       const real *wk, const real *wv, const vd_qkv *dx, vd_act *dhidden, real *dwq,
                                       real *dwk, real *dwv);

/* Stream-ordered. vd_ops.attention. A (stream, head) pair is computed by one thread in a fixed order, so that the
 * result depends neither on the number of threads nor on how streams are grouped into calls. */
void vd_cpu_attention(vd_ops *o, const vd_attention *a, const vd_qkv *x, vd_act *out, real *lse);

/* Stream-ordered. vd_ops.attention_backward; adds to dkey_pe and dspan stream after stream and head after head,
 * whatever the number of threads. */
void vd_cpu_attention_backward(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, const vd_act *out, const real *lse,
                               const vd_act *dout, const vd_qkv *dqkv, real *dkey_pe, real *dspan);

#endif
