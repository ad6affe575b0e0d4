/* Draws the next symbol of generated text from the model's logits. Host memory; no backend takes part. */
#ifndef VD_SAMPLER_H
#define VD_SAMPLER_H

#include "src/base/real.h"

#include <stdint.h>

typedef struct vd_sampler vd_sampler;

/* Not collective. A sampler of `vocab` symbols; vd_sampler_draw() says what the numbers mean. Free it with
 * vd_sampler_destroy(). */
vd_sampler *vd_sampler_create(int64_t vocab, double temperature, int64_t top_k, double top_p, uint64_t seed);
/* Not collective. Frees. NULL is allowed. */
void vd_sampler_destroy(vd_sampler *s);

/* Not collective. Draws symbol `position` of sample `sample` (both from 0) from softmax(logits / temperature), logits
 * [vocab] finite, restricted to the top_k likeliest and of these to the fewest likeliest whose probabilities add up to
 * top_p. Temperature 0: the likeliest symbol; equal ones by id. The random number depends on seed, sample and position
 * only. */
int64_t vd_sampler_draw(vd_sampler *s, const real *logits, uint32_t sample, int64_t position);

#endif
