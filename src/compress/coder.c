#include "src/compress/coder.h"

#include "src/base/error.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const uint64_t TOP = (uint64_t)1 << 56; /* a byte leaves where the range is below */

static void put_byte(vd_encoder *e, uint8_t byte) {
  if (e->n == e->capacity) {
    size_t capacity = 2 * e->capacity + 64;
    uint8_t *grown = vd_calloc(capacity, 1);
    if (e->n > 0) memcpy(grown, e->bytes, e->n);
    free(e->bytes);
    e->bytes = grown;
    e->capacity = capacity;
  }
  e->bytes[e->n++] = byte;
}

/* The interval's start moves up; where it passes 2^64 the bytes that have left count one up. They cannot all be 255:
 * the whole code is below 1. */
static void move_up(vd_encoder *e, uint64_t by) {
  e->low += by;
  if (e->low >= by) return;
  size_t i = e->n - 1;
  while (e->bytes[i] == 0xff) e->bytes[i--] = 0;
  e->bytes[i]++;
}

void vd_encoder_put(vd_encoder *e, uint32_t start, uint32_t size, int bits) {
  if (e->range == 0) e->range = UINT64_MAX;
  uint64_t part = e->range >> bits;
  move_up(e, part * start);
  e->range = part * size;
  while (e->range < TOP) {
    put_byte(e, (uint8_t)(e->low >> 56));
    e->low <<= 8;
    e->range <<= 8;
  }
}

/* One more byte is enough to name a number of the interval, which is at least 2^56 wide. */
void vd_encoder_end(vd_encoder *e) {
  if (e->range == 0) return;
  move_up(e, TOP - 1);
  put_byte(e, (uint8_t)(e->low >> 56));
  while (e->n > 0 && e->bytes[e->n - 1] == 0) e->n--;
}

void vd_encoder_free(vd_encoder *e) {
  free(e->bytes);
  *e = (vd_encoder){0};
}

static uint8_t next_byte(vd_decoder *d) {
  return d->at < d->n ? d->bytes[d->at++] : 0;
}

void vd_decoder_start(vd_decoder *d, const uint8_t *bytes, size_t n) {
  *d = (vd_decoder){.range = UINT64_MAX, .bytes = bytes, .n = n};
  for (int i = 0; i < 8; i++) d->code = d->code << 8 | next_byte(d);
}

uint32_t vd_decoder_peek(const vd_decoder *d, int bits) {
  uint64_t number = d->code / (d->range >> bits), most = ((uint64_t)1 << bits) - 1;
  return (uint32_t)(number < most ? number : most);
}

void vd_decoder_take(vd_decoder *d, uint32_t start, uint32_t size, int bits) {
  uint64_t part = d->range >> bits;
  d->code -= part * start;
  d->range = part * size;
  while (d->range < TOP) {
    d->code = d->code << 8 | next_byte(d);
    d->range <<= 8;
  }
}

void vd_frequencies_set(vd_frequencies *f, const real *logits, int n, uint32_t escape) {
  double weight[VD_MOST_SYMBOLS], sum = 0;
  int likeliest = 0;
  uint32_t at = 0, whole = (uint32_t)1 << VD_FREQUENCY_BITS;
  for (int i = 1; i < n; i++) likeliest = logits[i] > logits[likeliest] ? i : likeliest;
  for (int i = 0; i < n; i++) sum += weight[i] = exp((double)logits[i] - (double)logits[likeliest]);
  double scale = (double)(whole - escape - (uint32_t)n) / sum;
  f->n = n;
  for (int i = 0; i < n; i++) {
    f->start[i] = at;
    at += 1 + (uint32_t)(weight[i] * scale);
  }
  uint32_t left = whole - escape - at;
  for (int i = likeliest + 1; i < n; i++) f->start[i] += left;
  f->start[n] = whole - escape;
  f->start[n + 1] = whole;
}

int vd_frequencies_find(const vd_frequencies *f, uint32_t number) {
  int low = 0, high = f->n + 1; /* start[low] <= number < start[high] */
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (f->start[middle] <= number)
      low = middle;
    else
      high = middle;
  }
  return low;
}

uint32_t vd_escape_frequency(int64_t escapes, int64_t symbols) {
  const double whole = 1 << VD_FREQUENCY_BITS, most = whole * 63 / 64;
  double frequency = floor(whole * ((double)escapes * 256 + 1) / ((double)symbols * 256 + 512));
  return (uint32_t)(frequency < 1 ? 1 : frequency > most ? most : frequency);
}
