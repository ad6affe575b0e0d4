/* src/compress: files packed with the predictions of a model.
 *
 * Here live the arithmetic coder and the integer frequencies that it codes with (this header), the streams of a file
 * and the model that predicts them (compressor.h), the layout of packed files (packed_file.h), and what decides the
 * bits of a prediction: build, backend, BLAS (environment.h).
 * In:  bytes, or a packed file; the model of a checkpoint, made by the caller's ops.
 * Out: a packed file, or the bytes.
 * Encoder and decoder must see the same bits of every prediction. So both run the same steps of the same shapes in the
 * same order, and logits become integers by one function.
 *
 * The coder is a range coder with carry: an interval [low, low + range) of 64-bit numbers, of which each symbol takes
 * the part that its frequency is of 2^bits. Bytes leave at the top where range < 2^56; a carry runs back into those
 * that have left. range >> bits is at least 2^32 for the frequencies here, so that rounding costs below 1e-9 bits a
 * symbol.
 */
#ifndef VD_CODER_H
#define VD_CODER_H

#include "src/base/real.h"

#include <stddef.h>
#include <stdint.h>

enum { VD_FREQUENCY_BITS = 24, VD_MOST_SYMBOLS = 256 };

/* Zero at first. */
typedef struct vd_encoder {
  uint64_t low, range; /* range 0: nothing has been coded yet, and it is 2^64 - 1 */
  uint8_t *bytes;      /* [n] the code so far; owned */
  size_t n, capacity;
} vd_encoder;

/* Not collective. Codes the part [start, start + size) of 2^bits; size > 0, bits <= VD_FREQUENCY_BITS. */
void vd_encoder_put(vd_encoder *e, uint32_t start, uint32_t size, int bits);
/* Not collective. Ends the code: e->bytes [e->n] is whole. Zeros at its end are left out; none is left of no symbols.
 */
void vd_encoder_end(vd_encoder *e);
/* Not collective. Frees the code. */
void vd_encoder_free(vd_encoder *e);

/* Reads code [n], borrowed, and zeros behind it. */
typedef struct vd_decoder {
  uint64_t code, range; /* code: of the interval's start */
  const uint8_t *bytes;
  size_t n, at;
} vd_decoder;

/* Not collective. Begins to read bytes [n]. */
void vd_decoder_start(vd_decoder *d, const uint8_t *bytes, size_t n);
/* Not collective. A number in the part [start, start + size) of 2^bits that was coded next. Of a code that no encoder
 * wrote, some number below 2^bits. */
uint32_t vd_decoder_peek(const vd_decoder *d, int bits);
/* Not collective. Leaves the part that vd_decoder_peek found. */
void vd_decoder_take(vd_decoder *d, uint32_t start, uint32_t size, int bits);

/* Parts of 2^VD_FREQUENCY_BITS: symbol i has [start[i], start[i + 1]), and the escape is symbol n. */
typedef struct vd_frequencies {
  int n;
  uint32_t start[VD_MOST_SYMBOLS + 2];
} vd_frequencies;

/* Not collective. The frequencies of a softmax of logits [n], n <= VD_MOST_SYMBOLS, finite: each symbol gets at least
 * 1, the likeliest (the first of them) what rounding leaves. escape: frequency of the escape, at most
 * 2^VD_FREQUENCY_BITS - n; 0: there is none. The same logits give the same frequencies. */
void vd_frequencies_set(vd_frequencies *f, const real *logits, int n, uint32_t escape);
/* Not collective. The symbol whose part holds `number`, or the escape, f->n. */
int vd_frequencies_find(const vd_frequencies *f, uint32_t number);
/* Not collective. The frequency of an escape in a stream that had `escapes` of them in `symbols` symbols: (escapes +
 * 1/256) / (symbols + 2) of the whole, and at most 63/64 of it. */
uint32_t vd_escape_frequency(int64_t escapes, int64_t symbols);

#endif
