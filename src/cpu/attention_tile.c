#include "src/cpu/attention_tile.h"
#include "src/cpu/philox.h"

#include "src/base/error.h"

#include <stdlib.h>
#include <string.h>

typedef real vd_vector __attribute__((vector_size(VD_VECTOR_BYTES), aligned(sizeof(real)), may_alias));

/* VD_ROWS x `vectors` elements of C; the count is a constant where it is called, so that C stays in registers. */
static inline __attribute__((always_inline)) void kernel(const int vectors, int64_t k, const real *a, int64_t a_row,
                                                         int64_t a_col, const real *b, int64_t ldb, real *c,
                                                         int64_t ldc, bool add) {
  vd_vector sum[VD_ROWS][3];
  for (int r = 0; r < VD_ROWS; r++)
    for (int v = 0; v < vectors; v++)
      sum[r][v] = add ? *(const vd_vector *)(c + r * ldc + v * VD_LANES) : (vd_vector){0};
  for (int64_t p = 0; p < k; p++) {
    vd_vector row[3];
    for (int v = 0; v < vectors; v++) {
      row[v] = *(const vd_vector *)(b + p * ldb + v * VD_LANES);
      VD_KEEP(row[v]);
    }
    for (int r = 0; r < VD_ROWS; r++)
      for (int v = 0; v < vectors; v++) sum[r][v] += a[r * a_row + p * a_col] * row[v];
  }
  for (int r = 0; r < VD_ROWS; r++)
    for (int v = 0; v < vectors; v++) *(vd_vector *)(c + r * ldc + v * VD_LANES) = sum[r][v];
}

/* Three vectors at a time, and what is left in ones of two and one: with fewer sums in flight the multipliers would
 * wait for each other. */
static inline __attribute__((always_inline)) void product(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row,
                                                          int64_t a_col, const real *b, int64_t ldb, real *c,
                                                          int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 3 * VD_LANES <= n; j += 3 * VD_LANES)
    for (int64_t i = 0; i < m; i += VD_ROWS)
      kernel(3, k, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, add);
  for (; j + 2 * VD_LANES <= n; j += 2 * VD_LANES)
    for (int64_t i = 0; i < m; i += VD_ROWS)
      kernel(2, k, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, add);
  for (; j < n; j += VD_LANES)
    for (int64_t i = 0; i < m; i += VD_ROWS)
      kernel(1, k, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, add);
}

void vd_tile_product(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row, int64_t a_col, const real *b,
                     int64_t ldb, real *c, int64_t ldc, bool add) {
  if (a_col == 1)
    product(m, n, k, a, a_row, 1, b, ldb, c, ldc, add);
  else if (a_row == 1)
    product(m, n, k, a, 1, a_col, b, ldb, c, ldc, add);
  else
    product(m, n, k, a, a_row, a_col, b, ldb, c, ldc, add);
}

void vd_tile_band(const vd_attention_plan *plan, const vd_head_plan *head, int64_t i0, int64_t T, const real *x,
                  const real *y_columns, int64_t ld_y, real *s, bool add) {
  int64_t ld = head->ld - 1, wide = plan->wide;
  for (int64_t t = 0; t < T; t += VD_ROWS) {
    int64_t c = t / VD_LANES * VD_LANES; /* down to a whole vector: keys stay aligned */
    int64_t n = vd_round_up(t + VD_ROWS - 1 + head->n - c, VD_LANES);
    vd_tile_product(VD_ROWS, n, plan->a->d_head, x + (i0 + t) * wide, wide, 1, y_columns + i0 + c, ld_y, s + t * ld + c,
                    ld, add);
  }
}

vd_head_plan vd_tile_head(const vd_attention_plan *plan, int64_t h, int64_t i0, int64_t T) {
  enum { STEP = VD_ROWS > (int)VD_LANES ? VD_ROWS : (int)VD_LANES };
  vd_head_plan head = plan->heads[h];
  head.skip = vd_first_key(plan, &head, i0 + T - 1) / STEP * STEP;
  head.reach -= head.skip;
  head.n -= head.skip;
  head.ld = vd_leading(head.n + VD_MARGIN);
  head.first = head.first > head.skip ? head.first - head.skip : 0;
  head.seen = head.seen > head.skip ? head.seen - head.skip : 0;
  head.mask += head.skip;
  head.slope += head.skip;
  head.pe += head.skip;
  if (head.pe_rows) head.pe_rows += head.skip * plan->wide;
  return head;
}

void vd_tile_scores(const vd_attention_plan *plan, const vd_head_plan *head, int64_t i0, int64_t T,
                    const real *q_content, const real *q_position, const real *k_columns, int64_t ld_k, real *s) {
  vd_tile_product(vd_round_up(T, VD_ROWS), vd_round_up(head->n, VD_LANES), plan->a->d_head,
                  q_position + i0 * plan->wide, plan->wide, 1, head->pe, plan->ld_pe, s, head->ld, false);
  vd_tile_band(plan, head, i0, T, q_content, k_columns, ld_k, s, true);
}

void vd_pack_rows(const vd_attention_plan *plan, const real *from, int64_t ld, int64_t rows, int64_t padded, real *to) {
  int64_t width = plan->a->d_head, wide = plan->wide;
  for (int64_t i = 0; i < rows; i++) {
    memcpy(to + i * wide, from + i * ld, (size_t)width * sizeof *to);
    for (int64_t e = width; e < wide; e++) to[i * wide + e] = 0;
  }
  memset(to + rows * wide, 0, (size_t)((padded - rows) * wide) * sizeof(real));
}

real *vd_block_rows(const vd_attention_plan *plan, const vd_qkv *x, enum vd_part part, int64_t b, int64_t h) {
  return (real *)x->block + (b * plan->a->block * 3 + (int64_t)part) * plan->d + h * plan->a->d_head;
}

vd_key_rows vd_key_rows_of(const vd_attention_plan *plan, const vd_qkv *x, enum vd_part part, int64_t b, int64_t h) {
  const vd_attention *a = plan->a;
  int64_t reach = a->reach[h], remembered = reach < a->window ? reach : a->window;
  int64_t row = b * (x->memory_rows ? x->memory_rows : a->window) + a->window - remembered,
          column = (int64_t)(part == VD_VALUE) * plan->d + h * a->d_head;
  return (vd_key_rows){.absent = reach - remembered,
                       .remembered = remembered,
                       .memory = remembered > 0 ? (real *)x->memory + row * 2 * plan->d + column : NULL,
                       .block = vd_block_rows(plan, x, part, b, h)};
}

void vd_pack_queries(const vd_attention_plan *plan, const vd_qkv *x, int64_t b, int64_t h, const real *bias, real *to) {
  int64_t block = plan->a->block, width = plan->a->d_head;
  vd_pack_rows(plan, vd_block_rows(plan, x, VD_QUERY, b, h), 3 * plan->d, block, block + VD_MARGIN, to);
  for (int64_t i = 0; i < block; i++)
    for (int64_t e = 0; e < width; e++) {
      real *q = &to[i * plan->wide + e];
      *q = *q * plan->scale + (bias ? bias[h * width + e] * plan->scale : 0);
    }
}

void vd_pack_key_rows(const vd_attention_plan *plan, const vd_key_rows *keys, real *to) {
  int64_t wide = plan->wide, block = plan->a->block;
  memset(to, 0, (size_t)(keys->absent * wide) * sizeof *to);
  to += keys->absent * wide;
  vd_pack_rows(plan, keys->memory, 2 * plan->d, keys->remembered, keys->remembered, to);
  vd_pack_rows(plan, keys->block, 3 * plan->d, block, block + VD_MARGIN, to + keys->remembered * wide);
}

/* Columns 0 .. rows - 1 of to [d_head, ld]. */
static void pack_columns(const vd_attention_plan *plan, const real *from, int64_t ld_from, int64_t rows, int64_t ld,
                         real *to) {
  enum { BLOCK = 16 }; /* a block of rows stays in cache while each of its columns is written */
  int64_t width = plan->a->d_head;
  for (int64_t i0 = 0; i0 < rows; i0 += BLOCK) {
    int64_t n = rows - i0 < BLOCK ? rows - i0 : BLOCK;
    for (int64_t e = 0; e < width; e++)
      for (int64_t i = i0; i < i0 + n; i++) to[e * ld + i] = from[i * ld_from + e];
  }
}

void vd_pack_key_columns(const vd_attention_plan *plan, const vd_key_rows *keys, int64_t ld, real *to) {
  int64_t first = keys->absent + keys->remembered, end = first + plan->a->block;
  for (int64_t e = 0; e < plan->a->d_head; e++) {
    memset(to + e * ld, 0, (size_t)keys->absent * sizeof *to);
    memset(to + e * ld + end, 0, (size_t)(ld - end) * sizeof *to);
  }
  pack_columns(plan, keys->memory, 2 * plan->d, keys->remembered, ld, to + keys->absent);
  pack_columns(plan, keys->block, 3 * plan->d, plan->a->block, ld, to + first);
}

static void unpack_rows(const vd_attention_plan *plan, const real *from, int64_t rows, int64_t ld, real *to) {
  for (int64_t i = 0; i < rows; i++) memcpy(to + i * ld, from + i * plan->wide, (size_t)plan->a->d_head * sizeof *to);
}

void vd_unpack_key_rows(const vd_attention_plan *plan, const vd_key_rows *keys, const real *from) {
  from += keys->absent * plan->wide;
  unpack_rows(plan, from, keys->remembered, 2 * plan->d, keys->memory);
  unpack_rows(plan, from + keys->remembered * plan->wide, plan->a->block, 3 * plan->d, keys->block);
}

int64_t vd_tile_halves(const vd_attention_plan *plan, const vd_head_plan *head, int64_t stream, int64_t h, int64_t i0,
                       int64_t T, uint16_t *halves) {
  const vd_attention *a = plan->a;
  int64_t ld = vd_half_ld(head->n), Lr = vd_round_up(a->attn_span, 16), Mr = vd_round_up(a->block, 16);
  int64_t farthest = Lr + i0 - head->reach;
  int64_t base = (farthest < 0 ? farthest - 15 : farthest) / 16 * 16; /* key of column 0 */
  for (int64_t i = i0; i < i0 + T; i += 16) {
    int64_t newest = Lr + (i + 15 < i0 + T - 1 ? i + 15 : i0 + T - 1) - a->first_distance;
    int64_t oldest = Lr + i - head->reach > 0 ? Lr + i - head->reach : 0; /* none lies before attn_span */
    for (int64_t j = oldest / 16 * 16; j <= newest; j += 16) {
      uint64_t tile =
          (uint64_t)((((a->dropout.row0 + stream) * a->n_head + h) * (Mr / 16) + i / 16) * ((Lr + Mr) / 16) + j / 16);
      uint32_t words[4][VD_PHILOX_BATCH];
      vd_cpu_philox(&a->dropout.rng, tile * 32, words);
      for (int t = 0; t < 16; t++) { /* words of one row: low half first */
        uint16_t *to = halves + (i - i0 + t) * ld + (j - base);
        for (int g = 0; g < 2; g++)
          for (int c = 0; c < 4; c++) {
            uint32_t word = words[g + 2 * (t / 8)][t % 8 * 4 + c];
            to[8 * g + 2 * c] = (uint16_t)word;
            to[8 * g + 2 * c + 1] = (uint16_t)(word >> 16);
          }
      }
    }
  }
  return farthest - base;
}

void *vd_aligned(int64_t count) {
  size_t bytes = (size_t)vd_round_up((count + 1) * (int64_t)sizeof(real), 64);
  void *p = aligned_alloc(64, bytes);
  if (p == NULL) vd_bug("no memory for %zu bytes of attention workspace", bytes);
  return p;
}
