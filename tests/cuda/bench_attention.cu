/* Times the GPU's attention at the benchmark spans, and against one head's span with the other heads at 32.
 * Usage: bench_attention [STREAMS [DROPOUT [REPEATS [sweep|trimmed|xl]]]]; trimmed: with that softmax instead of
 * 'masked'; xl: Transformer-XL's layers of input/enwik8_transformer_xl.nml instead. Medians of CUDA event times, in
 * milliseconds; tab-separated. With REPEATS 0 every kernel of layers 0 and 11 runs once, for a profiler. */
#include "cuda/attention/attention.h"
#include "src/base/random.h"

#include <algorithm>
#include <cuda_bf16.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

enum { BLOCK = 512, N_HEAD = 8, D_HEAD = 64, WIDTH = N_HEAD * D_HEAD, ATTN_SPAN = 8192, RAMP = 32, N_LAYER = 12 };

static void check(cudaError_t e, const char *what) {
  if (e == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(e));
  exit(1);
}
static void *allocate(size_t bytes) {
  void *p;
  check(cudaMalloc(&p, bytes), "cudaMalloc");
  check(cudaMemset(p, 0, bytes), "cudaMemset");
  return p;
}

/* Values of about unit variance; zeros would run faster than real data. */
__global__ void fill(__nv_bfloat16 *x, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    vd_rng rng = {seed, 0, 0, VD_SITE_INIT};
    philox4x32_ctr_t w = vd_philox(rng, i);
    x[i] = __float2bfloat16((float)((vd_uniform(w.v[0]) + vd_uniform(w.v[1]) + vd_uniform(w.v[2]) - 1.5) * 2));
  }
}
static void *random_array(size_t n, uint32_t seed) {
  __nv_bfloat16 *p = (__nv_bfloat16 *)allocate(n * 2);
  fill<<<1024, 256>>>(p, n, seed);
  return p;
}

struct layer {
  vd_cuda_attention a;
  vd_cuda_attention_gradient g;
  long reach; /* summed over heads */
};

/* VD_BENCH_STORED_MIB in the environment: MiB of stored tiles instead of the usual limit. */
static size_t stored_limit() {
  const char *mib = getenv("VD_BENCH_STORED_MIB");
  return mib ? (size_t)atoi(mib) << 20 : 0;
}

static layer make_layer(int n_stream, double dropout, const std::vector<int> &spans, bool trimmed, uint16_t number,
                        void *table, float *dtable) {
  layer l;
  int longest = 0;
  float z[N_HEAD], *span = (float *)allocate(sizeof z);
  l.reach = 0;
  for (int h = 0; h < N_HEAD; h++) {
    int reach = std::min((int)ATTN_SPAN, spans[(size_t)h] + RAMP + 1);
    z[h] = (float)spans[(size_t)h] / ATTN_SPAN;
    longest = std::max(longest, reach);
    l.reach += reach;
  }
  if (trimmed) longest = std::min((int)ATTN_SPAN, (longest - 1 + 63) / 64 * 64), l.reach = (long)N_HEAD * longest;
  check(cudaMemcpy(span, z, sizeof z, cudaMemcpyHostToDevice), "copy");
  vd_rng rng = {1, 7, number, VD_SITE_ATTENTION};
  l.a = {VD_BF16, n_stream, BLOCK,   longest, N_HEAD,  D_HEAD, ATTN_SPAN,
         RAMP,    1,        trimmed, N_HEAD,  longest, span,   allocate(vd_cuda_attention_schedule_size()),
         dropout, rng,      0};
  l.a.key_tiles = N_HEAD; /* of 64 keys, the query tile's own included */
  for (int h = 0; h < N_HEAD; h++) l.a.key_tiles += ((trimmed ? longest : spans[(size_t)h] + RAMP + 1) + 63) / 64;
  l.a.stored_limit = stored_limit();
  l.a.dropout_mask = (uint32_t *)allocate(vd_cuda_attention_dropout_mask_size(&l.a));
  if (!getenv("VD_BENCH_NO_SPLITS")) l.a.splits = allocate(vd_cuda_attention_splits_size(&l.a));
  size_t nq = (size_t)n_stream * BLOCK * WIDTH, nk = (size_t)n_stream * (size_t)longest * WIDTH;
  l.g = {random_array(3 * nq, 1u),
         random_array(2 * nk, 2u),
         table,
         allocate(nq * 2),
         (float *)allocate((size_t)n_stream * N_HEAD * BLOCK * 4),
         random_array(nq, 4u),
         allocate(3 * nq * 2),
         allocate(2 * nk * 2),
         dtable,
         (float *)allocate(N_HEAD * 4),
         allocate(vd_cuda_attention_workspace_size(&l.a))};
  return l;
}
/* A layer of Transformer-XL: every query sees memory and block as far back as there are keys. */
static layer make_relative_layer(int n_stream, double dropout, uint16_t number) {
  enum { WINDOW = 512, REACH = WINDOW + BLOCK - 1 };
  layer l = {};
  l.reach = (long)N_HEAD * (2 * WINDOW + BLOCK + 1) / 2; /* on average */
  l.a.type = VD_BF16, l.a.n_stream = n_stream, l.a.block = BLOCK, l.a.window = l.a.attn_span = WINDOW;
  l.a.n_head = N_HEAD, l.a.d_head = D_HEAD, l.a.rel_stride = WIDTH;
  l.a.kv_rows = WINDOW, l.a.dropout = dropout, l.a.rng = {1, 7, number, VD_SITE_ATTENTION};
  l.a.schedule = allocate(vd_cuda_attention_schedule_size());
  l.a.rel_key = random_array((size_t)(REACH + 1) * WIDTH, 5u), l.a.reach = REACH;
  l.a.content_bias = (const float *)allocate(WIDTH * 4), l.a.position_bias = (const float *)allocate(WIDTH * 4);
  l.a.bias_scores = (float *)allocate(vd_cuda_attention_bias_scores_size(&l.a));
  l.a.dropout_mask = (uint32_t *)allocate(vd_cuda_attention_dropout_mask_size(&l.a));
  size_t nq = (size_t)n_stream * BLOCK * WIDTH, nk = (size_t)n_stream * WINDOW * WIDTH;
  l.g.block = random_array(3 * nq, 1u), l.g.memory = random_array(2 * nk, 2u);
  l.g.out = allocate(nq * 2), l.g.lse = (float *)allocate((size_t)n_stream * N_HEAD * BLOCK * 4);
  l.g.dout = random_array(nq, 4u), l.g.dblock = allocate(3 * nq * 2), l.g.dmemory = allocate(2 * nk * 2);
  l.g.drel_key = (float *)allocate((size_t)(REACH + 1) * WIDTH * 4);
  l.g.dcontent_bias = (float *)allocate(WIDTH * 4), l.g.dposition_bias = (float *)allocate(WIDTH * 4);
  l.a.stored_limit = stored_limit();
  l.g.workspace = allocate(vd_cuda_attention_workspace_size(&l.a));
  return l;
}
static void free_layer(layer *l) {
  const void *all[] = {l->a.span, l->a.schedule, l->g.block,   l->g.memory, l->g.out,       l->g.lse,
                       l->g.dout, l->g.dblock,   l->g.dmemory, l->g.dspan,  l->g.workspace, l->a.dropout_mask};
  for (const void *p : all) cudaFree((void *)p);
}

static void plan(const std::vector<layer> &layers) {
  std::vector<vd_cuda_attention> a;
  for (const layer &l : layers) a.push_back(l.a);
  check(vd_cuda_attention_make_schedules((int32_t)a.size(), a.data(), 0), "plans");
}
static void forward(const layer &l) {
  check(vd_cuda_attention_forward(&l.a, l.g.block, l.g.memory, l.g.table, (void *)l.g.out, (float *)l.g.lse, 0),
        "forward");
}
static void backward(const layer &l) {
  check(vd_cuda_attention_backward(&l.a, &l.g, 0), "backward");
}

static double median(std::vector<float> &t) {
  std::sort(t.begin(), t.end());
  return t[t.size() / 2];
}

/* Medians of forward and backward of these layers in turn; [n] holds the totals. */
static void measure(const std::vector<layer> &layers, int repeats, std::vector<double> *f, std::vector<double> *b) {
  size_t n = layers.size();
  std::vector<cudaEvent_t> event(2 * n + 2);
  std::vector<std::vector<float>> ft(n + 1), bt(n + 1);
  for (cudaEvent_t &e : event) check(cudaEventCreate(&e), "event");
  for (int r = -5; r < repeats; r++) {
    check(cudaEventRecord(event[0]), "event");
    plan(layers);
    for (size_t i = 0; i < n; i++) forward(layers[i]), check(cudaEventRecord(event[i + 1]), "event");
    check(cudaEventRecord(event[n + 1]), "event");
    for (size_t i = 0; i < n; i++) backward(layers[n - 1 - i]), check(cudaEventRecord(event[n + 2 + i]), "event");
    check(cudaDeviceSynchronize(), "kernels");
    float t;
    for (size_t i = 0; r >= 0 && i < n; i++) {
      cudaEventElapsedTime(&t, event[i], event[i + 1]), ft[i].push_back(t);
      cudaEventElapsedTime(&t, event[n + 1 + i], event[n + 2 + i]), bt[n - 1 - i].push_back(t);
    }
    if (r < 0) continue;
    cudaEventElapsedTime(&t, event[0], event[n]), ft[n].push_back(t);
    cudaEventElapsedTime(&t, event[n + 1], event[2 * n + 1]), bt[n].push_back(t);
  }
  for (size_t i = 0; i <= n; i++) f->push_back(median(ft[i])), b->push_back(median(bt[i]));
  for (cudaEvent_t &e : event) cudaEventDestroy(e);
}

static void report(const char *name, double pairs, double f, double b) {
  printf("%s\t%.1f\t%.4f\t%.4f\t%.4f\t%.0f\n", name, pairs / 1e6, f, b, f + b, pairs * 11 * 2 * D_HEAD / (f + b) / 1e9);
}

int main(int argc, char **argv) {
  int n_stream = argc > 1 ? atoi(argv[1]) : 16, repeats = argc > 3 ? atoi(argv[3]) : 31;
  double dropout = argc > 2 ? atof(argv[2]) : 0.3, queries = (double)n_stream * BLOCK;
  void *table = random_array((size_t)ATTN_SPAN * D_HEAD, 5u);
  float *dtable = (float *)allocate(vd_cuda_attention_dtable_size(VD_BF16, D_HEAD, ATTN_SPAN));
  std::vector<layer> layers;
  double pairs = 0;
  bool relative = argc > 4 && strcmp(argv[4], "xl") == 0, trimmed = argc > 4 && strcmp(argv[4], "trimmed") == 0;
  for (int l = 0; l < N_LAYER; l++) {
    std::vector<int> spans = {8, 16, 16, 24, 24, 32, 40, 64};
    if (l >= 5) spans = {16, 24, 40, 64, 110, 220, 700, 1024 + 512 * (l - 5)};
    layers.push_back(relative ? make_relative_layer(n_stream, dropout, (uint16_t)l)
                              : make_layer(n_stream, dropout, spans, trimmed, (uint16_t)l, table, dtable));
    pairs += queries * (double)layers.back().reach;
  }
  if (repeats == 0) {
    plan(layers);
    for (int i : {0, 11, 0, 11}) forward(layers[(size_t)i]), backward(layers[(size_t)i]);
    check(cudaDeviceSynchronize(), "kernels");
    return 0;
  }
  std::vector<double> f, b;
  measure(layers, repeats, &f, &b);
  printf("streams %d dropout %g\nlayer\tMpairs\tforward\tbackward\tboth\tTFLOP/s of 11 products\n", n_stream, dropout);
  for (int l = 0; l < N_LAYER; l++) {
    char name[16];
    snprintf(name, sizeof name, "%d", l);
    report(name, queries * (double)layers[(size_t)l].reach, f[(size_t)l], b[(size_t)l]);
  }
  report("all", pairs, f[N_LAYER], b[N_LAYER]);
  for (layer &l : layers) free_layer(&l);
  for (int span = 8; argc > 4 && strcmp(argv[4], "sweep") == 0 && span <= ATTN_SPAN; span *= 2) {
    std::vector<layer> one = {
        make_layer(n_stream, dropout, {span, 32, 32, 32, 32, 32, 32, 32}, false, 0, table, dtable)};
    std::vector<double> sf, sb;
    char name[24];
    measure(one, repeats, &sf, &sb);
    snprintf(name, sizeof name, "span %d", span);
    report(name, queries * (double)one[0].reach, sf[1], sb[1]);
    free_layer(&one[0]);
  }
  return 0;
}
