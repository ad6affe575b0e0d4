/* The attention entries of the CPU backend's table of operations: see vd_attention and vd_ops in ops.h, where shapes,
 * ownership and equations stand. They return when the work is done; vd_bug() where a contract of ops.h is broken. */
#ifndef VD_CPU_ATTENTION_H
#define VD_CPU_ATTENTION_H

#include "ops.h"

/* Stream-ordered. vd_ops.attention_project: q [n, d] of the block; k, v [n_stream, window + block, d], of which head h
 * gets the rows >= window - reach[h]. */
void vd_cpu_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                              const real *wk, const real *wv, vd_act *q, vd_act *k, vd_act *v);

/* Stream-ordered. vd_ops.attention_project_backward: adds to dhidden [n, d] and dwq, dwk, dwv [d, d]; dk, dv are read
 * where head h reaches. */
void vd_cpu_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                       const real *wk, const real *wv, const vd_act *dq, const vd_act *dk,
                                       const vd_act *dv, vd_act *dhidden, real *dwq, real *dwk, real *dwv);

/* Stream-ordered. vd_ops.attention: out [n, d], lse [n_stream, n_head, block]. A (stream, head) pair is computed by one
 * thread in a fixed order, so that the result depends neither on the number of threads nor on how streams are grouped
 * into calls. */
void vd_cpu_attention(vd_ops *o, const vd_attention *a, const vd_act *q, const vd_act *k, const vd_act *v, vd_act *out,
                      real *lse);

/* Stream-ordered. vd_ops.attention_backward: writes dq [n, d] and the rows of dk, dv [n_stream, window + block, d] that
 * head h reaches; adds to dkey_pe [d_head, attn_span] and dspan [n_span], stream after stream and head after head,
 * whatever the number of threads. */
void vd_cpu_attention_backward(vd_ops *o, const vd_attention *a, const vd_act *q, const vd_act *k, const vd_act *v,
                               const vd_act *out, const real *lse, const vd_act *dout, vd_act *dq, vd_act *dk,
                               vd_act *dv, real *dkey_pe, real *dspan);

#endif
