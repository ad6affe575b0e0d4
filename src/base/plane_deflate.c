#include "src/base/plane_deflate.h"

#include "src/base/byte_counts.h"

#include <endian.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum {
  END_OF_BLOCK = 256,
  MATCH_258 = 285, /* a match of 258 bytes; it has no extra bits */
  N_SYMBOL = 286,
  N_DISTANCE = 2,
  MOST_BITS = 12, /* of a code: four of them and a started byte fit into 64 bits */
  STORED_BYTES = 65535,
  HEADER_BITS = 3 + 5 + 5 + 4 + 19 * 3 /* of a block with codes of its own, before their lengths */
};

/* Bits on their way out, the first one lowest. The words behind `out` may be overwritten, up to 8 bytes. */
typedef struct bit_writer {
  uint8_t *out;
  uint64_t bits;
  unsigned n; /* in `bits`; below 8 after flush() */
} bit_writer;

static inline void put(bit_writer *w, uint64_t value, unsigned n) {
  w->bits |= value << w->n;
  w->n += n;
}

static inline void flush(bit_writer *w) {
  uint64_t word = htole64(w->bits);
  memcpy(w->out, &word, sizeof word);
  w->out += w->n / 8;
  w->bits = w->n >= 64 ? 0 : w->bits >> (w->n & ~7u);
  w->n &= 7;
}

static void align_to_byte(bit_writer *w) {
  flush(w);
  if (w->n > 0) w->n = 8;
  flush(w);
}

/* Huffman codes of a block: bits [symbol] reversed, as deflate sends them. */
typedef struct code {
  uint8_t length[N_SYMBOL]; /* 0: the symbol does not occur */
  uint16_t bits[N_SYMBOL];
} code;

struct leaf {
  uint32_t count;
  int symbol;
};

static int by_count(const void *a, const void *b) {
  const struct leaf *x = a, *y = b;
  return x->count != y->count ? (x->count < y->count ? -1 : 1) : x->symbol - y->symbol;
}

/* Depths of the leaves [n >= 2] of Huffman's tree, leaves sorted by count, into depth. Returns the greatest. */
static int tree_depths(const struct leaf *leaf, int n, uint8_t depth[N_SYMBOL]) {
  uint64_t count[2 * N_SYMBOL];
  int parent[2 * N_SYMBOL], level[2 * N_SYMBOL], next_leaf = 0, next_node = n, most = 0;
  for (int i = 0; i < n; i++) count[i] = leaf[i].count;
  for (int made = n; made < 2 * n - 1; made++) {
    count[made] = 0;
    for (int k = 0; k < 2; k++) {
      bool take_leaf = next_leaf < n && (next_node >= made || count[next_leaf] <= count[next_node]);
      int least = take_leaf ? next_leaf++ : next_node++;
      count[made] += count[least];
      parent[least] = made;
    }
  }
  level[2 * n - 2] = 0;
  for (int i = 2 * n - 3; i >= 0; i--) {
    level[i] = level[parent[i]] + 1;
    if (i < n) depth[i] = (uint8_t)level[i];
    if (level[i] > most) most = level[i];
  }
  return most;
}

/* Lengths of at most MOST_BITS bits. Counts that make longer ones are halved until none is. */
static void choose_lengths(const uint32_t count[N_SYMBOL], code *c) {
  struct leaf leaf[N_SYMBOL];
  uint8_t depth[N_SYMBOL];
  int n = 0;
  memset(c->length, 0, sizeof c->length);
  for (int s = 0; s < N_SYMBOL; s++)
    if (count[s] > 0) leaf[n++] = (struct leaf){count[s], s};
  qsort(leaf, (size_t)n, sizeof *leaf, by_count);
  while (tree_depths(leaf, n, depth) > MOST_BITS)
    for (int i = 0; i < n; i++) leaf[i].count = (leaf[i].count + 1) / 2; /* keeps them sorted */
  for (int i = 0; i < n; i++) c->length[leaf[i].symbol] = depth[i];
}

/* The canonical codes of RFC 1951, 3.2.2. */
static void choose_bits(code *c) {
  unsigned of_length[MOST_BITS + 1] = {0}, next[MOST_BITS + 1] = {0};
  for (int s = 0; s < N_SYMBOL; s++) of_length[c->length[s]]++;
  of_length[0] = 0;
  for (int l = 1; l <= MOST_BITS; l++) next[l] = (next[l - 1] + of_length[l - 1]) << 1;
  for (int s = 0; s < N_SYMBOL; s++) {
    unsigned straight = c->length[s] ? next[c->length[s]]++ : 0, reversed = 0;
    for (int k = 0; k < c->length[s]; k++) reversed |= (straight >> k & 1) << (c->length[s] - 1 - k);
    c->bits[s] = (uint16_t)reversed;
  }
}

/* Bits of a block with these codes; extra: of what follows the codes. */
static uint64_t block_bits(const code *c, const uint32_t count[N_SYMBOL], uint64_t extra) {
  uint64_t bits = HEADER_BITS + 4 * (N_SYMBOL + N_DISTANCE) + extra;
  for (int s = 0; s < N_SYMBOL; s++) bits += (uint64_t)count[s] * c->length[s];
  return bits;
}

/* The head of a block that brings its codes. Their lengths are 0 to 15, and each is sent in 4 bits. Both distances have
 * a code, since some readers refuse a block without a complete set of them. */
static void put_code(bit_writer *w, const code *c, bool last) {
  put(w, last, 1);
  put(w, 2, 2);
  put(w, N_SYMBOL - 257, 5);
  put(w, N_DISTANCE - 1, 5);
  put(w, 19 - 4, 4);
  flush(w);
  for (int i = 0; i < 19; i++) { /* repeat codes 16, 17 and 18 come first, and are not used */
    put(w, i < 3 ? 0 : 4, 3);
    flush(w);
  }
  static const uint8_t reversed[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
  for (int s = 0; s < N_SYMBOL + N_DISTANCE; s++) {
    put(w, reversed[s < N_SYMBOL ? c->length[s] : 1], 4);
    flush(w);
  }
}

static inline void put_symbol(bit_writer *w, const code *c, int symbol) {
  put(w, c->bits[symbol], c->length[symbol]);
}

static void put_bytes(bit_writer *w, const code *c, const uint8_t *x, size_t n) {
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    put_symbol(w, c, x[i]);
    put_symbol(w, c, x[i + 1]);
    put_symbol(w, c, x[i + 2]);
    put_symbol(w, c, x[i + 3]);
    flush(w);
  }
  for (; i < n; i++) {
    put_symbol(w, c, x[i]);
    flush(w);
  }
}

static void put_stored(bit_writer *w, const uint8_t *x, size_t n, bool last) {
  while (n > 0) {
    size_t part = n < STORED_BYTES ? n : STORED_BYTES;
    put(w, last && part == n, 1);
    put(w, 0, 2);
    align_to_byte(w);
    put(w, part, 16);
    put(w, part ^ 0xffff, 16);
    flush(w);
    memcpy(w->out, x, part);
    w->out += part;
    x += part;
    n -= part;
  }
}

static uint64_t stored_bits(size_t n) {
  return 8 * ((uint64_t)n + 5 * (n / STORED_BYTES + 1));
}

/* The first byte, then matches of 258 bytes at distance 1, then the rest as bytes. */
static uint64_t plan_run(uint8_t byte, size_t n, uint32_t count[N_SYMBOL], code *c) {
  size_t matches = (n - 1) / 258;
  count[byte] = (uint32_t)(n - 258 * matches);
  count[MATCH_258] = (uint32_t)matches;
  choose_lengths(count, c);
  return block_bits(c, count, matches);
}

static void put_run(bit_writer *w, const code *c, const uint8_t *x, const uint32_t count[N_SYMBOL]) {
  put_symbol(w, c, x[0]);
  for (uint32_t i = 0; i < count[MATCH_258]; i++) {
    put_symbol(w, c, MATCH_258);
    put(w, 0, 1); /* the code of distance 1 */
    flush(w);
  }
  put_bytes(w, c, x, count[x[0]] - 1);
}

/* True where Huffman codes would save less than about an eighth: some 8,000 of the bytes are looked at. */
static bool is_noise(const uint8_t *x, size_t n) {
  uint64_t count[256] = {0}, squares = 0, seen = 0;
  for (size_t i = 0, step = n / 8192 + 1; i < n; i += step, seen++) count[x[i]]++;
  for (int i = 0; i < 256; i++) squares += count[i] * count[i];
  return 128 * squares < seen * seen;
}

static void put_plane(bit_writer *w, const uint8_t *x, size_t n, bool last) {
  uint32_t count[N_SYMBOL] = {[END_OF_BLOCK] = 1};
  code c;
  bool run = n == 1 || memcmp(x, x + 1, n - 1) == 0;
  uint64_t bits = UINT64_MAX;
  if (run) {
    bits = plan_run(x[0], n, count, &c);
  } else if (!is_noise(x, n)) {
    vd_byte_counts(x, n, count);
    choose_lengths(count, &c);
    bits = block_bits(&c, count, 0);
  }
  if (bits >= stored_bits(n)) {
    put_stored(w, x, n, last);
    return;
  }
  choose_bits(&c);
  put_code(w, &c, last);
  if (run)
    put_run(w, &c, x, count);
  else
    put_bytes(w, &c, x, n);
  put_symbol(w, &c, END_OF_BLOCK);
  flush(w);
}

/* One pass over the data, in parts that stay in the first cache; loops that the compiler makes vector code of. */
static void split_planes(const uint8_t *restrict data, size_t n, size_t size, uint8_t *restrict planes) {
  enum { PART = 1024 };
  for (size_t i = 0; i < n; i += PART) {
    size_t m = n - i < PART ? n - i : PART;
    for (size_t k = 0; k < size; k++) {
      const uint8_t *from = data + i * size + k;
      uint8_t *to = planes + k * n + i;
      if (size == 4)
        for (size_t j = 0; j < m; j++) to[j] = from[4 * j];
      else
        for (size_t j = 0; j < m; j++) to[j] = from[size * j];
    }
  }
}

/* Adler-32 of RFC 1950. zlib's takes a third of the whole time; the compiler makes vector code of these sums. */
static uint32_t adler32_of(const uint8_t *x, size_t n) {
  enum { BASE = 65521, PART = 4096 /* its sums stay below 2^32 */ };
  uint32_t a = 1, b = 0;
  for (size_t i = 0; i < n; i += PART) {
    uint32_t m = n - i < PART ? (uint32_t)(n - i) : PART, sum = 0, weighted = 0;
    for (uint32_t j = 0; j < m; j++) {
      sum += x[i + j];
      weighted += (m - j) * x[i + j];
    }
    b = (b + m * a + weighted) % BASE;
    a = (a + sum) % BASE;
  }
  return b << 16 | a;
}

size_t vd_plane_deflate_bound(size_t n, size_t size) {
  return 2 + size * (n + 5 * (n / STORED_BYTES + 2)) + 4 + sizeof(uint64_t);
}

size_t vd_plane_deflate(const void *data, size_t n, size_t size, uint8_t *planes, uint8_t *out) {
  static const uint8_t zlib_header[2] = {0x78, 0x01};
  bit_writer w = {.out = out + 2};
  memcpy(out, zlib_header, 2);
  split_planes(data, n, size, planes);
  for (size_t k = 0; k < size; k++) put_plane(&w, planes + k * n, n, k + 1 == size);
  align_to_byte(&w);
  uint32_t check = htobe32(adler32_of(planes, n * size));
  memcpy(w.out, &check, sizeof check);
  return (size_t)(w.out + sizeof check - out);
}
