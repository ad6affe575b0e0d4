#include "tests/math/qkv.h"

#include <stdlib.h>
#include <string.h>

/* Where part 0, 1, 2 (q, k, v) of row `row` of a stream lies; rows of q count from the block's first, as those of
 * negative number do. */
static real *place(const vd_attention *a, const vd_qkv *x, int part, int64_t stream, int64_t row) {
  int64_t d = a->n_head * a->d_head;
  if (row < 0) return (real *)x->memory + (((stream + 1) * a->window + row) * 2 + part - 1) * d;
  return (real *)x->block + ((stream * a->block + row) * 3 + part) * d;
}

/* Copies between each row of q, k, v and its place. */
static void copy(const vd_attention *a, const vd_qkv *x, bool pack, real *const tensor[3]) {
  int64_t d = a->n_head * a->d_head;
  for (int part = 0; part < 3; part++) {
    int64_t before = part == 0 ? 0 : a->window, rows = before + a->block;
    for (int64_t i = 0; i < a->n_stream * rows; i++) {
      real *mine = tensor[part] + i * d, *theirs = place(a, x, part, i / rows, i % rows - before);
      memcpy(pack ? theirs : mine, pack ? mine : theirs, (size_t)d * sizeof *mine);
    }
  }
}

vd_qkv qkv_pack(const vd_attention *a, const real *q, const real *k, const real *v) {
  size_t d = (size_t)(a->n_head * a->d_head), streams = (size_t)a->n_stream;
  vd_qkv x = {vd_calloc(streams * (size_t)a->block * 3 * d, sizeof(real)),
              vd_calloc(streams * (size_t)a->window * 2 * d + 1, sizeof(real)), 0};
  copy(a, &x, true, (real *const[]){(real *)q, (real *)k, (real *)v});
  return x;
}

void qkv_unpack(const vd_attention *a, const vd_qkv *x, real *q, real *k, real *v) {
  copy(a, x, false, (real *const[]){q, k, v});
}

void qkv_free(vd_qkv *x) {
  free(x->block);
  free(x->memory);
}
