/* What the tests of single kernels share: arrays of each activation type on the device and in double on the host. */
#ifndef VD_DEVICE_ARRAYS_CUH
#define VD_DEVICE_ARRAYS_CUH

#include "cuda/attention/attention.h"
#include "src/base/random.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

typedef std::vector<double> vec;

static void check(cudaError_t e, const char *what) {
  if (e == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(e));
  exit(1);
}

static const char *name_of(vd_precision type) {
  return type == VD_FP32 ? "fp32" : type == VD_BF16 ? "bf16" : "fp16";
}
static size_t size_of(vd_precision type) {
  return type == VD_FP32 ? 4 : 2;
}
static void store(vd_precision type, void *to, size_t i, double x) {
  if (type == VD_FP32) ((float *)to)[i] = (float)x;
  if (type == VD_BF16) ((__nv_bfloat16 *)to)[i] = __float2bfloat16((float)x);
  if (type == VD_FP16) ((__half *)to)[i] = __float2half((float)x);
}
static double load(vd_precision type, const void *from, size_t i) {
  if (type == VD_FP32) return ((const float *)from)[i];
  if (type == VD_BF16) return __bfloat162float(((const __nv_bfloat16 *)from)[i]);
  return __half2float(((const __half *)from)[i]);
}

/* Waits. n elements as doubles. */
static vec fetch(vd_precision type, const void *device, size_t n) {
  std::vector<char> host(n * 4);
  vec x(n);
  check(cudaMemcpy(host.data(), device, n * size_of(type), cudaMemcpyDeviceToHost), "copy");
  for (size_t i = 0; i < n; i++) x[i] = load(type, host.data(), i);
  return x;
}

/* Random numbers of a test: uniform in [0, 1), and normal. */
static inline double uniform(uint64_t *state) {
  *state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
  return (double)(*state >> 11) / 9007199254740992.0;
}
static inline double normal(uint64_t *state) {
  double u = uniform(state) + 1e-18, v = uniform(state);
  return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

#endif
