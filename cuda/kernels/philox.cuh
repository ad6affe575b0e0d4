/* Philox 4x32-10 for kernels that draw much: the numbers of vd_philox() (src/base/random.h), with one instruction for
 * each 32 x 32 bit product and the keys of the rounds made by the host. As a kernel argument they are operands from the
 * constant bank; made by the kernel, each would wait for the uniform data path. */
#ifndef VD_PHILOX_CUH
#define VD_PHILOX_CUH

#include "src/base/rng.h"

enum { VD_PHILOX_ROUNDS = 10 };
typedef struct vd_philox_keys {
  uint32_t round[VD_PHILOX_ROUNDS][2];
  uint32_t counter[2]; /* the upper words of the counter: update; layer and site */
} vd_philox_keys;

/* Not collective. The keys of all numbers of one site of one layer in one update. */
static inline vd_philox_keys vd_make_philox_keys(vd_rng rng) {
  vd_philox_keys keys = {{}, {rng.update, (uint32_t)rng.layer | (uint32_t)rng.site << 16}};
  for (uint32_t i = 0; i < VD_PHILOX_ROUNDS; i++) {
    keys.round[i][0] = (uint32_t)rng.seed + i * 0x9e3779b9U;
    keys.round[i][1] = (uint32_t)(rng.seed >> 32) + i * 0xbb67ae85U;
  }
  return keys;
}

/* The 64-bit product of two 32-bit words. */
static __device__ __forceinline__ void vd_mul_wide(uint32_t x, uint32_t y, uint32_t *low, uint32_t *high) {
  asm("{\n.reg .b64 p;\nmul.wide.u32 p, %2, %3;\nmov.b64 {%0, %1}, p;\n}" : "=r"(*low), "=r"(*high) : "r"(x), "r"(y));
}

/* The four words of a call, and the 16 bits of its lane 0..7, as in src/base/random.h. */
typedef struct vd_philox_words {
  uint32_t v[4];
} vd_philox_words;
static __device__ __forceinline__ uint32_t vd_dropout_bits(const vd_philox_words &words, int lane) {
  return (words.v[lane >> 1] >> ((lane & 1) * 16)) & 0xffffU;
}
/* 1 in each half of a word that is at least the threshold, 1 .. 65535, and 0 in the other. */
static __device__ __forceinline__ uint32_t vd_kept_halves(uint32_t word, uint32_t threshold) {
  const uint32_t most = (threshold - 1) * 0x10001U;       /* most: dropped up to here */
  return __vminu2(__vmaxu2(word, most) - most, 0x10001U); /* no half of the maximum is less: nothing is borrowed */
}
/* All bits of each half of a word that is at least the threshold, and none of the other. */
static __device__ __forceinline__ uint32_t vd_keep_mask(uint32_t word, uint32_t threshold) {
  return vd_kept_halves(word, threshold) * 0xffffU;
}
/* A mask of two halves from the signs of the bytes of `bits`: bytes 0 and 1, or where `upper` bytes 2 and 3. */
static __device__ __forceinline__ uint32_t vd_sign_mask(uint32_t bits, bool upper) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(bits), "r"(upper ? 0xbbaa : 0x9988));
  return mask;
}
/* One round of N calls, which change places with their products. */
template <int N>
static __device__ __forceinline__ void vd_philox_round(uint32_t key0, uint32_t key1, vd_philox_words words[N]) {
  uint32_t low0[N], high0[N], low1[N], high1[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    vd_mul_wide(words[n].v[0], 0xd2511f53U, &low0[n], &high0[n]);
    vd_mul_wide(words[n].v[2], 0xcd9e8d57U, &low1[n], &high1[n]);
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
    uint32_t *x = words[n].v;
    x[0] = high1[n] ^ x[1] ^ key0, x[1] = low1[n];
    x[2] = high0[n] ^ x[3] ^ key1, x[3] = low0[n];
  }
}
/* Calls number call, call + step ... A call by itself waits for its products most of the time. Here the rounds of
 * several are side by side, five in an iteration of a loop, because the compiler puts them one call after the other
 * again where all rounds are unrolled. */
enum { VD_PHILOX_UNROLLED = 5 };
static_assert(VD_PHILOX_ROUNDS % VD_PHILOX_UNROLLED == 0, "whole iterations of the loop");
template <int N>
static __device__ __forceinline__ void vd_draw_calls(const vd_philox_keys &keys, uint64_t call, uint64_t step,
                                                     vd_philox_words words[N]) {
#pragma unroll
  for (int n = 0; n < N; n++, call += step)
    words[n] = {{(uint32_t)call, (uint32_t)(call >> 32), keys.counter[0], keys.counter[1]}};
  uint32_t key0 = keys.round[0][0], key1 = keys.round[0][1];
#pragma unroll 1
  for (int i = 0; i < VD_PHILOX_ROUNDS; i += VD_PHILOX_UNROLLED) {
#pragma unroll
    for (int k = 0; k < VD_PHILOX_UNROLLED; k++, key0 += 0x9e3779b9U, key1 += 0xbb67ae85U)
      vd_philox_round<N>(key0, key1, words);
  }
}
/* One call. */
static __device__ __forceinline__ vd_philox_words vd_draw_words(const vd_philox_keys &keys, uint64_t call) {
  vd_philox_words words = {{(uint32_t)call, (uint32_t)(call >> 32), keys.counter[0], keys.counter[1]}};
#pragma unroll
  for (int i = 0; i < VD_PHILOX_ROUNDS; i++) vd_philox_round<1>(keys.round[i][0], keys.round[i][1], &words);
  return words;
}

#endif
