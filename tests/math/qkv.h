/* Queries, keys and values one by one, as plain loops want them, and side by side, as struct vd_qkv has them. */
#ifndef VD_TEST_QKV_H
#define VD_TEST_QKV_H

#include "src/ops/ops.h"

/* Not collective. A layer's arrays of q [n_stream, block, d] and of k and v [n_stream, window + block, d], of which the
 * memory has the first `window` rows of each stream. Free with qkv_free. */
vd_qkv qkv_pack(const vd_attention *a, const real *q, const real *k, const real *v);
/* Not collective. The reverse. */
void qkv_unpack(const vd_attention *a, const vd_qkv *x, real *q, real *k, real *v);
/* Not collective. Frees both arrays. */
void qkv_free(vd_qkv *x);

#endif
