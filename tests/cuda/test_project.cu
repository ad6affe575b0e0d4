/* The GPU's projection of memory and its gradient against a double reference of naive loops on the host. Outputs hold
 * NaN before, as do gradients of k and v out of a head's reach, so that a write, a missing write or a read out of place
 * shows. Usage: test_project [CASE...], or test_project bench [STREAMS]: times at learnt spans. */
#include "cuda/attention/memory_projection.h"
#include "tests/cuda/device_arrays.cuh"

#include <algorithm>
#include <math.h>
#include <string.h>

struct test_case {
  const char *name;
  int n_stream, window, memory_rows, n_head, d_head, attn_span, ramp, trimmed, spare_rows;
  std::vector<float> z;
};

static const std::vector<test_case> cases = {
    {"short", 1, 64, 64, 1, 64, 64, 8, 0, 5, {0}},
    {"spans", 2, 300, 300, 5, 64, 300, 32, 0, 70, {0, 0.3f, 0.77f, 1, 0.05f}},
    {"more_memory", 3, 201, 333, 4, 32, 400, 7, 0, 33, {0.02f, 0.3f, 0.4f, 0}},
    {"less_memory", 2, 300, 131, 3, 64, 300, 32, 0, 1, {0, 1, 0.4f}},
    {"no_memory", 2, 50, 0, 2, 64, 50, 8, 0, 3, {0, 1}},
    {"narrow", 2, 77, 80, 7, 16, 100, 1, 0, 9, {0, 0.3f, 0.5f, 0.6f, 0.2f, 0.01f, 0.9f}},
    {"padded", 1, 150, 150, 3, 24, 150, 10, 0, 8, {0.2f, 0.9f, 0}},
    {"wide", 2, 140, 150, 2, 128, 140, 10, 0, 8, {0.1f, 0.9f}},
    {"between", 1, 140, 150, 3, 72, 140, 10, 0, 8, {0.1f, 0.9f, 0.5f}},
    {"trimmed", 2, 129, 200, 3, 64, 200, 32, 1, 64, {0, 0.3f, 0.5f}},
    {"trimmed_even", 2, 700, 720, 6, 64, 700, 32, 1, 64, {0, 0.3f, 0.05f, 1, 0.1f, 0.6f}},
    {"trimmed_wide", 2, 140, 150, 3, 128, 140, 10, 1, 8, {0.1f, 0.9f, 0.3f}},
    {"many_heads", 1, 90, 90, 40, 8, 90, 4, 0, 4, std::vector<float>(40, 0.7f)},
    {"eight", 3, 900, 960, 8, 64, 900, 32, 0, 37, {0.4f, 0.02f, 1, 0.01f, 0.3f, 0, 0.05f, 0.6f}},
    {"many_streams", 48, 128, 130, 8, 64, 128, 32, 0, 5, {0.1f, 0.02f, 0.2f, 0.01f, 0.3f, 0, 0.05f, 0.9f}},
    {"many_streams_five", 48, 128, 130, 5, 64, 128, 32, 0, 5, {0.1f, 0.02f, 0.2f, 0.01f, 0.9f}},
    {"one_far", 1, 30000, 30000, 8, 64, 30000, 32, 0, 9, {0, 0, 0, 1, 0, 0, 0, 0}},
    {"trimmed_eight", 3, 900, 960, 8, 64, 900, 32, 1, 37, {0.4f, 0.02f, 0.9f, 0.01f, 0.3f, 0, 0.05f, 0.6f}},
    {"long", 3, 1500, 1500, 2, 64, 1500, 32, 0, 4, {1, 0.01f}},
};

/* About normal. */
static double random_value(uint64_t *state) {
  double sum = -6;
  for (int i = 0; i < 12; i++) {
    *state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
    sum += (double)(*state >> 11) / 9007199254740992.0;
  }
  return sum;
}
static vec random_values(vd_precision type, size_t n, uint64_t *state) {
  vec x(n);
  char one[4];
  for (double &v : x) store(type, one, 0, random_value(state)), v = load(type, one, 0);
  return x;
}
static void *to_device(vd_precision type, const vec &x) {
  std::vector<char> host(x.size() * 4 + 4);
  void *device;
  for (size_t i = 0; i < x.size(); i++) store(type, host.data(), i, x[i]);
  check(cudaMalloc(&device, x.size() * size_of(type) + 16), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), x.size() * size_of(type), cudaMemcpyHostToDevice), "copy");
  return device;
}
/* Elements where `want` is NaN must be NaN still. */
static int compare(const char *what, const vec &got, const vec &want, double tolerance) {
  double d2 = 0, w2 = 0;
  long touched = 0;
  for (size_t i = 0; i < want.size(); i++) {
    if (isnan(want[i])) {
      touched += !isnan(got[i]);
      continue;
    }
    d2 += (got[i] - want[i]) * (got[i] - want[i]), w2 += want[i] * want[i];
  }
  double error = sqrt(d2 / (w2 > 0 ? w2 : 1));
  bool good = error <= tolerance && touched == 0; /* a NaN error fails */
  printf(" %s %.1e%s", what, error, good ? "" : " FAILED");
  if (touched) printf(" (%ld elements written out of reach)", touched);
  return good ? 0 : 1;
}

static int run_case(const test_case &c, vd_precision type, double tolerance, uint64_t state) {
  int d = c.n_head * c.d_head, rows = c.window + c.spare_rows;
  size_t nw = (size_t)(d * d), nk = (size_t)(c.n_stream * rows * 2 * d);
  vec memory = random_values(type, (size_t)(c.n_stream * c.memory_rows * d), &state);
  vec w[2], dy = random_values(type, nk, &state), y(nk, NAN), dw[2], dy_device(nk, NAN);
  for (int i = 0; i < 2; i++) {
    w[i] = random_values(type, nw, &state);
    dw[i] = random_values(VD_FP32, nw, &state);
  }
  void *gm = to_device(type, memory), *gw[2], *gy = to_device(type, y), *gdw[2], *plan, *scratch;
  for (int i = 0; i < 2; i++) gw[i] = to_device(type, w[i]), gdw[i] = to_device(VD_FP32, dw[i]);
  const vd_cuda_ring ring = {gm, c.memory_rows, 2 * c.memory_rows / 3};
  for (int h = 0; h < c.n_head; h++) {
    int own = (int)floor((double)c.z[(size_t)h] * c.attn_span) + c.ramp + 1; /* as far back as values are needed */
    int limit = std::min(c.window, c.memory_rows),
        reach[2] = {c.trimmed ? limit : std::min(own, limit), std::min(own, limit)};
    for (int s = 0; s < c.n_stream; s++)
      for (int i = 0; i < 2; i++)
        for (int r = c.window - reach[i]; r < c.window; r++)
          for (int o = h * c.d_head; o < (h + 1) * c.d_head; o++) {
            int place = ((int)ring.oldest + c.memory_rows - c.window + r) % c.memory_rows;
            const double *m = &memory[(size_t)((s * c.memory_rows + place) * d)];
            size_t at = (size_t)(((s * rows + r) * 2 + i) * d + o);
            double sum = 0;
            dy_device[at] = dy[at];
            for (int l = 0; l < d; l++) {
              sum += w[i][(size_t)(o * d + l)] * m[l];
              dw[i][(size_t)(o * d + l)] += dy[at] * m[l];
            }
            y[at] = sum;
          }
  }
  void *gdy = to_device(type, dy_device);
  vec z(c.z.begin(), c.z.end());
  float *span = (float *)to_device(VD_FP32, z);
  vd_cuda_attention a = {};
  a.type = type, a.n_stream = c.n_stream, a.block = c.spare_rows, a.window = c.window, a.n_head = c.n_head;
  a.d_head = c.d_head, a.attn_span = c.attn_span, a.ramp = c.ramp, a.first_distance = 1, a.trimmed = c.trimmed;
  a.n_span = c.n_head, a.kv_rows = rows, a.span = span;
  check(cudaMalloc(&plan, vd_cuda_attention_schedule_size()), "cudaMalloc");
  check(cudaMemset(plan, 0, vd_cuda_attention_schedule_size()), "cudaMemset");
  check(cudaMalloc(&scratch, vd_cuda_project_workspace_size(&a)), "cudaMalloc");
  check(cudaMemset(scratch, 0xff, vd_cuda_project_workspace_size(&a)), "cudaMemset");
  a.schedule = plan;
  check(vd_cuda_attention_make_schedule(&a, 0), "make_schedule");
  check(vd_cuda_project_memory(&a, &ring, gw[0], gw[1], gy, 0), "project");
  check(vd_cuda_project_memory_backward(&a, &ring, gdy, (float *)gdw[0], (float *)gdw[1], scratch, 0),
        "project backward");
  check(cudaDeviceSynchronize(), "kernels");
  printf("%-12s %s:", c.name, name_of(type));
  int bad = compare("k and v", fetch(type, gy, nk), y, tolerance);
  bad += compare("dwk", fetch(VD_FP32, gdw[0], nw), dw[0], 2e-6); /* rounded nowhere but in fp32 sums */
  bad += compare("dwv", fetch(VD_FP32, gdw[1], nw), dw[1], 2e-6);
  printf("\n");
  void *all[] = {gm, gw[0], gw[1], gy, gdy, gdw[0], gdw[1], span, plan, scratch};
  for (void *p : all) check(cudaFree(p), "cudaFree");
  return bad;
}

__global__ void fill(__nv_bfloat16 *x, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    vd_rng rng = {seed, 0, 0, VD_SITE_INIT};
    x[i] = __float2bfloat16((float)(4 * vd_uniform(vd_philox(rng, i).v[0]) - 2));
  }
}
static void *filled(size_t n, uint32_t seed) {
  __nv_bfloat16 *p;
  check(cudaMalloc(&p, n * 2), "cudaMalloc");
  fill<<<1024, 256>>>(p, n, seed);
  return p;
}

/* Medians of CUDA event times of 20 calls in turn, to hide what a launch costs the host; bf16, 8 heads of 64, layer by
 * layer; FLOP counts the rows reached alone. */
static int bench(int n_stream) {
  enum { N = 21, IN_TURN = 20, N_HEAD = 8, D = 512, BLOCK = 512, SPAN = 8192, RAMP = 32, ROWS = 4096 + 64 };
  size_t n = (size_t)n_stream * ROWS * D;
  void *memory = filled(n, 1), *w = filled(2 * D * D, 2), *kv = filled(2 * n, 3), *plan, *scratch;
  float *dw = (float *)filled(4 * D * D, 5), *span = (float *)filled(2 * N_HEAD, 6), total[2] = {0, 0};
  check(cudaMalloc(&plan, vd_cuda_attention_schedule_size()), "cudaMalloc");
  check(cudaMemset(plan, 0, vd_cuda_attention_schedule_size()), "cudaMemset");
  check(cudaMemset(dw, 0, 8 * D * D), "cudaMemset");
  const vd_cuda_ring ring = {memory, ROWS, 0};
  cudaEvent_t event[3];
  for (cudaEvent_t &e : event) check(cudaEventCreate(&e), "event");
  double all = 0;
  printf("streams %d\nlayer\tGFLOP\tforward ms\tbackward ms\tTFLOP/s\n", n_stream);
  for (int l = 0; l < 12; l++) {
    std::vector<int> spans = {8, 16, 16, 24, 24, 32, 40, 64};
    if (l >= 5) spans = {16, 24, 40, 64, 110, 220, 700, 1024 + 512 * (l - 5)};
    float z[N_HEAD];
    double flop = 0;
    for (int h = 0; h < N_HEAD; h++)
      z[h] = (float)spans[h] / SPAN, flop += 4.0 * (spans[h] + RAMP + 1) * 64 * D * n_stream;
    check(cudaMemcpy(span, z, sizeof z, cudaMemcpyHostToDevice), "copy");
    vd_cuda_attention a = {VD_BF16, n_stream, BLOCK, ROWS, N_HEAD, 64, SPAN, RAMP, 1,
                           0,       N_HEAD,   ROWS,  span, plan,   0,  {},   0};
    if (l == 0) check(cudaMalloc(&scratch, vd_cuda_project_workspace_size(&a)), "cudaMalloc");
    check(vd_cuda_attention_make_schedule(&a, 0), "plan");
    std::vector<float> t[2];
    for (int r = 0; r < N + 3; r++) {
      check(cudaEventRecord(event[0]), "event");
      for (int i = 0; i < IN_TURN; i++)
        check(vd_cuda_project_memory(&a, &ring, w, (char *)w + 2 * D * D, kv, 0), "project");
      check(cudaEventRecord(event[1]), "event");
      for (int i = 0; i < IN_TURN; i++)
        check(vd_cuda_project_memory_backward(&a, &ring, kv, dw, dw + D * D, scratch, 0), "backward");
      check(cudaEventRecord(event[2]), "event");
      check(cudaDeviceSynchronize(), "kernels");
      for (int i = 0; r >= 3 && i < 2; i++) {
        float ms;
        check(cudaEventElapsedTime(&ms, event[i], event[i + 1]), "event");
        t[i].push_back(ms / IN_TURN);
      }
    }
    for (int i = 0; i < 2; i++) std::sort(t[i].begin(), t[i].end()), total[i] += t[i][N / 2];
    printf("%d\t%.2f\t%.4f\t%.4f\t%.0f\t%.0f\n", l, flop / 1e9, t[0][N / 2], t[1][N / 2], flop / t[0][N / 2] / 1e9,
           flop / t[1][N / 2] / 1e9);
    all += flop;
  }
  printf("all\t%.2f\t%.4f\t%.4f\t%.0f\t%.0f\n", all / 1e9, total[0], total[1], all / total[0] / 1e9,
         all / total[1] / 1e9);
  return 0;
}

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "bench") == 0) return bench(argc > 2 ? atoi(argv[2]) : 16);
  /* Bounds: one rounding of the result to the type (2^-9, 2^-12), and fp32 sums. */
  const double tolerance[] = {2e-6, 3e-3, 4e-4};
  int bad = 0, n = 0;
  for (const test_case &c : cases) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; i++) wanted = wanted || strcmp(argv[i], c.name) == 0;
    for (int type = VD_FP32; wanted && type <= VD_FP16; type++, n++)
      bad += run_case(c, (vd_precision)type, tolerance[type - VD_FP32], (uint64_t)(n + 1) * 7919);
  }
  printf("%d cases, %d quantities FAILED\n", n, bad);
  return bad > 0 || n == 0;
}
