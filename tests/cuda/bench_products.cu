/* Times the products whose weights stay in shared memory (cuda/kernels/ffn.h, rows_product.h), bf16, d = 512: hidden
 * units of 2048 with dropout that the kernel draws or reads, and without, their gradient, and plain products. Usage:
 * bench_products [ROWS]. Medians of CUDA event times of 10 calls in turn, which hides what a launch costs the host;
 * tab-separated. */
#include "cuda/kernels/ffn.h"
#include "cuda/kernels/rows_product.h"
#include "tests/cuda/device_arrays.cuh"

#include <algorithm>

enum { D = 512, WIDTH = 2048, N = 11, IN_TURN = 10 };

/* n values in -0.5 .. 0.5; zeros would run faster than real data. */
static void *random_array(size_t n, uint64_t seed) {
  std::vector<__nv_bfloat16> host(n);
  void *p;
  for (size_t i = 0; i < n; i++) store(VD_BF16, host.data(), i, uniform(&seed) - 0.5);
  check(cudaMalloc(&p, n * 2), "cudaMalloc");
  check(cudaMemcpy(p, host.data(), n * 2, cudaMemcpyHostToDevice), "copy");
  return p;
}
static float *zeros(size_t n) {
  float *p;
  check(cudaMalloc(&p, n * 4), "cudaMalloc");
  check(cudaMemset(p, 0, n * 4), "cudaMemset");
  return p;
}

template <typename Call> static void bench(const char *name, double flop, Call call) {
  cudaEvent_t event[2];
  std::vector<float> t;
  for (cudaEvent_t &e : event) check(cudaEventCreate(&e), "event");
  for (int r = 0; r < N; r++) {
    float ms;
    check(cudaEventRecord(event[0]), "event");
    for (int i = 0; i < IN_TURN; i++) check(call(), name);
    check(cudaEventRecord(event[1]), "event");
    check(cudaEventSynchronize(event[1]), name);
    check(cudaEventElapsedTime(&ms, event[0], event[1]), "event");
    t.push_back(ms / IN_TURN);
  }
  std::sort(t.begin(), t.end());
  printf("%s\t%.4f\t%.0f\n", name, t[N / 2], flop / t[N / 2] / 1e9);
}

int main(int argc, char **argv) {
  const int64_t n = argc > 1 ? atoll(argv[1]) : 32768;
  if (n < 1) return 2;
  void *x = random_array((size_t)n * D, 1), *w = random_array((size_t)WIDTH * D, 2);
  void *y = random_array((size_t)n * WIDTH, 3), *out = random_array((size_t)n * WIDTH, 4);
  float *bias = zeros(WIDTH), *partial = zeros((size_t)(vd_cuda_ffn_partials(WIDTH) * WIDTH));
  const double flop = 2.0 * (double)n * D * WIDTH;
  printf("rows %lld\nproduct\tms\tTFLOP/s\n", (long long)n);
  for (double p : {0.3, 0.0}) {
    const vd_dropout drop = {p, {5, 1, 2, VD_SITE_HIDDEN}, 0};
    bench(p > 0 ? "hidden, dropout" : "hidden", flop,
          [&] { return vd_cuda_ffn(VD_BF16, n, D, WIDTH, x, w, bias, &drop, NULL, out, 0); });
  }
  const vd_unit_mask mask = {
      {0.3, {5, 1, 2, VD_SITE_HIDDEN}, 0}, n, WIDTH, (uint32_t *)random_array((size_t)n * WIDTH / 16, 5)};
  bench("hidden, mask read", flop,
        [&] { return vd_cuda_ffn(VD_BF16, n, D, WIDTH, x, w, bias, &mask.dropout, &mask, out, 0); });
  bench("hidden, gradient", flop,
        [&] { return vd_cuda_ffn_backward(VD_BF16, n, D, WIDTH, x, w, y, 1.4f, out, partial, 0); });
  for (int64_t width : {512, 1536})
    for (bool across : {false, true}) {
      const vd_rows_product p = {n, D, width, x, w, D, across, out, width};
      char name[64];
      snprintf(name, sizeof name, "%d > %lld%s", D, (long long)width, across ? ", across" : "");
      if (vd_cuda_rows_product_supports(VD_BF16, &p))
        bench(name, 2.0 * (double)n * D * (double)width, [&] { return vd_cuda_rows_product(VD_BF16, &p, 0); });
    }
  return 0;
}
