/* Philox 4x32-10 for many counters at once, for the dropout masks of the CPU backend. */
#ifndef VD_CPU_PHILOX_H
#define VD_CPU_PHILOX_H

#include "src/base/random.h"

enum { VD_PHILOX_BATCH = 32 };

/* Not collective. The words of calls call .. call + 31 of vd_philox (random.h): words[w][c] is word w of call + c.
 * `call` is a multiple of 32. Written so that the loop over calls becomes vector instructions; Random123's own function
 * takes one counter at a time. */
void vd_cpu_philox(const vd_rng *rng, uint64_t call, uint32_t words[4][VD_PHILOX_BATCH]);

#endif
