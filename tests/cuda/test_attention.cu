/* The GPU's attention against a double reference of naive loops on the host, on random inputs: outputs and all
 * gradients, odd sizes and the edges of spans included. Memory rows out of a head's reach hold NaN, as do outputs
 * before each run, and all shared memory, so that a read or a missing write out of place shows. Usage: test_attention
 * [CASE...] */
#include "tests/cuda/attention_cases.cuh"
#include "tests/cuda/device_arrays.cuh"

#include <algorithm>
#include <math.h>
#include <string.h>

struct reference {
  vec out, lse, dq, dk, dv, dkey_pe, dspan;
  double dspan_terms; /* sum over rows of the squared sums of |terms| that make up dspan */
  std::vector<int> reach;
};

static bool kept(const test_case &c, vd_rng rng, int64_t stream, int head, int i, int kappa) {
  uint32_t threshold = vd_dropout_threshold(c.dropout);
  if (threshold == 0) return true;
  int64_t span = (c.attn_span + 15) / 16 * 16, tiles = span / 16 + (c.block + 15) / 16, j = kappa + span;
  int64_t tile = ((stream * c.n_head + head) * ((c.block + 15) / 16) + i / 16) * tiles + j / 16;
  philox4x32_ctr_t words = vd_philox(rng, (uint64_t)(tile * 32 + (i % 8) * 4 + (j % 8) / 2));
  int lane = (int)((j % 2) + 2 * ((j / 8) % 2) + 4 * ((i / 8) % 2));
  return vd_dropout_half(words, lane) >= threshold;
}

/* One row of queries: forward, then backward. */
static void reference_row(const test_case &c, vd_rng rng, int64_t row0, int b, int h, int i, const vec &q, const vec &k,
                          const vec &v, const vec &pe, const vec &dout, reference *r) {
  int d = c.d_head, stride = c.n_head * d, rows = c.window + c.block, reach = r->reach[(size_t)h];
  double z = (double)c.z[(size_t)(c.n_span == 1 ? 0 : h)] * c.attn_span, scale = 1 / sqrt((double)d);
  double keep_scale = vd_dropout_scale(vd_dropout_threshold(c.dropout)), sum = 0, highest = -1e300, total = 0;
  vec s((size_t)reach + 1), m((size_t)reach + 1), a((size_t)reach + 1), da((size_t)reach + 1);
  const double *qi = &q[(size_t)((b * c.block + i) * stride + h * d)],
               *go = &dout[(size_t)((b * c.block + i) * stride + h * d)];
  double *o = &r->out[(size_t)((b * c.block + i) * stride + h * d)],
         *gq = &r->dq[(size_t)((b * c.block + i) * stride + h * d)];
  for (int x = 1; x <= reach; x++) {
    const double *kj = &k[(size_t)((b * rows + c.window + i - x) * stride + h * d)];
    for (int l = 0; l < d; l++)
      s[(size_t)x] += qi[l] * (kj[l] + pe[(size_t)(l * c.attn_span + c.attn_span - x)]) * scale;
    m[(size_t)x] = fmin(1, fmax(0, (z - (x - 1)) / c.ramp + 1));
    if (c.trimmed || m[(size_t)x] > 0) highest = fmax(highest, s[(size_t)x]);
  }
  for (int x = 1; x <= reach; x++) sum += (c.trimmed ? 1 : m[(size_t)x]) * exp(s[(size_t)x] - highest);
  double lse = highest + log(sum);
  r->lse[(size_t)((b * c.n_head + h) * c.block + i)] = lse;
  for (int x = 1; x <= reach; x++) {
    size_t j = (size_t)((b * rows + c.window + i - x) * stride + h * d);
    double drop = kept(c, rng, row0 + b, h, i, i - x) ? keep_scale : 0;
    a[(size_t)x] = m[(size_t)x] * exp(s[(size_t)x] - lse);
    for (int l = 0; l < d; l++) {
      o[l] += drop * a[(size_t)x] * v[j + (size_t)l];
      r->dv[j + (size_t)l] += drop * a[(size_t)x] * go[l];
      da[(size_t)x] += drop * go[l] * v[j + (size_t)l];
    }
    total += a[(size_t)x] * da[(size_t)x];
  }
  double terms = 0;
  for (int x = 1; x <= reach; x++) {
    size_t j = (size_t)((b * rows + c.window + i - x) * stride + h * d);
    double p = exp(s[(size_t)x] - lse), u = (z - (x - 1)) / c.ramp + 1;
    if (!c.trimmed && m[(size_t)x] == 0) p = fmin(p, (double)c.ramp); /* as src/ops/ops.h has it */
    double ds = c.trimmed ? p * (m[(size_t)x] * da[(size_t)x] - total) : a[(size_t)x] * (da[(size_t)x] - total);
    if (u >= 0 && u <= 1) {
      double term = p * (da[(size_t)x] - (c.trimmed ? 0 : total)) * c.attn_span / c.ramp;
      r->dspan[(size_t)(c.n_span == 1 ? 0 : h)] += term;
      terms += fabs(term);
    }
    for (int l = 0; l < d; l++) {
      size_t at = (size_t)(l * c.attn_span + c.attn_span - x);
      gq[l] += ds * scale * (k[j + (size_t)l] + pe[at]);
      r->dk[j + (size_t)l] += ds * scale * qi[l];
      r->dkey_pe[at] += ds * scale * qi[l];
    }
  }
  r->dspan_terms += terms * terms;
}

/* Random values, rounded to the type, on host (x) and device (returned). */
static void *random_array(vd_precision type, vec *x, size_t n, double size, uint64_t *state) {
  void *host = calloc(n, 4), *device;
  x->resize(n);
  for (size_t i = 0; i < n; i++) {
    store(type, host, i, size * normal(state));
    (*x)[i] = load(type, host, i);
  }
  check(cudaMalloc(&device, n * size_of(type)), "cudaMalloc");
  check(cudaMemcpy(device, host, n * size_of(type), cudaMemcpyHostToDevice), "copy");
  free(host);
  return device;
}
static void random_values(vd_precision type, vec *x, size_t n, uint64_t *state, double size = 1) {
  x->resize(n);
  for (double &e : *x) {
    char one[4];
    store(type, one, 0, size * normal(state));
    e = load(type, one, 0);
  }
}
static void *filled(size_t bytes, int value) {
  void *p;
  check(cudaMalloc(&p, bytes), "cudaMalloc");
  check(cudaMemset(p, value, bytes), "cudaMemset");
  return p;
}

/* Fills the shared memory of every multiprocessor with NaN, of whichever type: no kernel may read it unwritten. */
__global__ void spoil_kernel(int words) {
  extern __shared__ volatile uint32_t shared[];
  for (int i = (int)threadIdx.x; i < words; i += (int)blockDim.x) shared[i] = 0xffffffffU;
}
static void spoil_shared() {
  int bytes, blocks;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "shared memory");
  check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
  check(cudaFuncSetAttribute(spoil_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  spoil_kernel<<<2 * blocks, 256, bytes>>>(bytes / 4);
  check(cudaDeviceSynchronize(), "spoiling shared memory");
}
/* least2: a lower bound of the square of the norm that errors are compared with. */
static int compare(const char *what, const vec &got, const vec &want, double tolerance, double least2) {
  double d2 = 0, w2 = 0;
  for (size_t i = 0; i < want.size(); i++) {
    d2 += (got[i] - want[i]) * (got[i] - want[i]);
    w2 += want[i] * want[i];
  }
  double error = sqrt(d2 / (fmax(w2, least2) > 0 ? fmax(w2, least2) : 1));
  bool good = error <= tolerance; /* NaN fails */
  printf(" %s %.1e%s", what, error, good ? "" : " FAILED");
  return good ? 0 : 1;
}

/* A layer's arrays as attention.h has them, for q [n_stream * block, width] and k and v [n_stream, window + block,
 * width]; the memory has `spare` rows more. */
struct layer_shape {
  int n_stream, block, window, width, spare;
  size_t block_size() const { return (size_t)(n_stream * block * 3 * width); }
  size_t memory_size() const { return (size_t)(n_stream * (window + spare) * 2 * width); }
};
struct layer_arrays {
  void *block, *memory;
};

/* Calls each(array, index there, index in k) with the places of keys (part 1) or values (2): array 0 is the block's. */
template <typename EACH> static void for_keys(const layer_shape &s, int part, EACH each) {
  int rows = s.window + s.block;
  for (int i = 0; i < s.n_stream * rows * s.width; i++) {
    int c = i % s.width, row = i / s.width % rows, b = i / s.width / rows;
    if (row < s.window) {
      each(1, (size_t)(((b * (s.window + s.spare) + row) * 2 + part - 1) * s.width + c), (size_t)i);
    } else {
      each(0, (size_t)(((b * s.block + row - s.window) * 3 + part) * s.width + c), (size_t)i);
    }
  }
}

/* q, k, v on the device, with NaN where no head sees them; seen: elements of keys, of values. */
static layer_arrays upload(vd_precision type, const layer_shape &s, const vec &q, const vec &k, const vec &v,
                           const std::vector<bool> seen[2]) {
  vec host[2] = {vec(s.block_size(), NAN), vec(s.memory_size(), NAN)};
  void *device[2];
  for (size_t i = 0; i < q.size(); i++) host[0][i / (size_t)s.width * 3 * (size_t)s.width + i % (size_t)s.width] = q[i];
  for (int part = 1; part < 3; part++)
    for_keys(s, part, [&](int array, size_t at, size_t i) {
      if (seen[part - 1][i]) host[array][at] = (part == 1 ? k : v)[i];
    });
  for (int array = 0; array < 2; array++) {
    size_t n = host[array].size();
    std::vector<char> bytes(n * 4 + 4);
    for (size_t i = 0; i < n; i++) store(type, bytes.data(), i, host[array][i]);
    check(cudaMalloc(&device[array], n * size_of(type) + 16), "cudaMalloc");
    check(cudaMemcpy(device[array], bytes.data(), n * size_of(type), cudaMemcpyHostToDevice), "copy");
  }
  return {device[0], device[1]};
}

/* The reverse. What no head sees must be NaN still, spare rows too; it becomes 0 in k and v. */
static int download(vd_precision type, const layer_shape &s, const layer_arrays &x, const std::vector<bool> seen[2],
                    vec *q, vec *k, vec *v) {
  vec host[2] = {fetch(type, x.block, s.block_size()), fetch(type, x.memory, s.memory_size())};
  q->resize(s.block_size() / 3), k->assign(seen[0].size(), 0), v->assign(seen[1].size(), 0);
  for (size_t i = 0; i < q->size(); i++)
    (*q)[i] = host[0][i / (size_t)s.width * 3 * (size_t)s.width + i % (size_t)s.width];
  for (int part = 1; part < 3; part++)
    for_keys(s, part, [&](int array, size_t at, size_t i) {
      if (!seen[part - 1][i]) return;
      (*(part == 1 ? k : v))[i] = host[array][at];
      if (array == 1) host[array][at] = NAN;
    });
  int wrong = 0;
  for (double e : host[1]) wrong += !isnan(e);
  if (wrong) printf(" %d elements written out of reach: FAILED", wrong);
  return wrong > 0;
}

/* The dropout mask that forward writes and backward reads; NULL where the kernels use none. */
static uint32_t *allocate_mask(const vd_cuda_attention &a) {
  size_t bytes = vd_cuda_attention_dropout_mask_size(&a);
  return bytes > 0 ? (uint32_t *)filled(bytes, 0x55) : NULL;
}

/* The reach of each head, or its own span, beyond which values are not needed. */
static std::vector<int> reaches_of(const test_case &c, bool own) {
  std::vector<int> reaches;
  for (int h = 0; h < c.n_head; h++) {
    int reach = (int)floor((double)c.z[(size_t)(c.n_span == 1 ? 0 : h)] * c.attn_span) + c.ramp + 1;
    reaches.push_back((c.trimmed && !own) || reach > c.window ? c.window : reach);
  }
  return reaches;
}

/* Shortens the longest heads by `tiles` tiles of keys in all, as the tile scheduler does for want of room. */
static void cut_longest(std::vector<int> *reach, int tiles) {
  for (; tiles > 0; tiles--) {
    int &longest = *std::max_element(reach->begin(), reach->end());
    longest = ((longest + 63) / 64 - 1) * 64;
  }
}

/* The reaches within which values are needed, of heads with these reaches. */
static std::vector<int> own_within(const test_case &c, const std::vector<int> &reach) {
  std::vector<int> own = reaches_of(c, true);
  for (size_t h = 0; h < own.size(); h++) own[h] = std::min(own[h], reach[h]);
  return own;
}

/* Which elements of keys, or of values, some query sees. */
static std::vector<bool> seen_within(const test_case &c, const std::vector<int> &reach) {
  int stride = c.n_head * c.d_head, rows = c.window + c.block;
  std::vector<bool> seen((size_t)(c.n_stream * rows * stride));
  for (size_t i = 0; i < seen.size(); i++) {
    int column = (int)(i % (size_t)stride), row = (int)(i / (size_t)stride) % rows;
    seen[i] = row >= c.window - reach[(size_t)(column / c.d_head)];
  }
  return seen;
}

/* Forward twice, since the work counters must be zero again for a second run, and backward on two streams. */
static void run_kernels(const vd_cuda_attention &a, vd_cuda_attention_gradient g, void *out, float *lse) {
  check(vd_cuda_attention_make_schedule(&a, 0), "make_schedule");
  for (int run = 0; run < 2; run++) {
    spoil_shared();
    check(vd_cuda_attention_forward(&a, g.block, g.memory, g.table, out, lse, 0), "forward");
  }
  check(cudaDeviceSynchronize(), "forward");
  check(cudaStreamCreateWithFlags(&g.side, cudaStreamNonBlocking), "stream");
  check(cudaEventCreateWithFlags(&g.fork, cudaEventDisableTiming), "event");
  check(cudaEventCreateWithFlags(&g.join, cudaEventDisableTiming), "event");
  spoil_shared();
  check(vd_cuda_attention_backward(&a, &g, 0), "backward");
  check(cudaDeviceSynchronize(), "backward");
  cudaStreamDestroy(g.side), cudaEventDestroy(g.fork), cudaEventDestroy(g.join);
}

/* For every other case a limit that makes backward take the streams in groups. */
static size_t stored_limit(uint64_t seed) {
  return seed % 2 ? 0 : (size_t)512 << 10;
}

static int run_case(const test_case &c, vd_precision type, double tolerance, uint64_t seed) {
  uint64_t state = seed;
  int stride = c.n_head * c.d_head, rows = c.window + c.block;
  const layer_shape shape = {c.n_stream, c.block, c.window, stride, c.memory_spare};
  size_t nq = (size_t)(c.n_stream * c.block * stride), nk = (size_t)(c.n_stream * rows * stride);
  size_t np = (size_t)(c.d_head * c.attn_span), nl = (size_t)(c.n_stream * c.n_head * c.block);
  vec q, k, v, pe, dout;
  void *gdo = random_array(type, &dout, nq, 1, &state);
  random_values(type, &q, nq, &state, c.query_size), random_values(type, &k, nk, &state);
  random_values(type, &v, nk, &state);
  float *gpe = (float *)random_array(VD_FP32, &pe, np, 1, &state);
  reference r = {vec(nq), vec(nl), vec(nq), vec(nk), vec(nk), vec(np), vec((size_t)c.n_span), 0, {}};
  r.reach = reaches_of(c, false);
  cut_longest(&r.reach, c.cut);
  /* The table as the device rounds it; NaN where no head may read. */
  for (size_t i = 0; type != VD_FP32 && i < np; i++) {
    char one[4];
    store(type, one, 0, pe[i]);
    pe[i] = load(type, one, 0);
  }
  const std::vector<bool> seen[2] = {seen_within(c, r.reach), seen_within(c, own_within(c, r.reach))};
  layer_arrays x = upload(type, shape, q, k, v, seen);

  vd_rng rng = {1234567890123ULL + seed, 17, 3, VD_SITE_ATTENTION};
  vd_cuda_attention a = {type,        c.n_stream, c.block,   c.window,  c.n_head, c.d_head,
                         c.attn_span, c.ramp,     1,         c.trimmed, c.n_span, c.window + c.memory_spare,
                         NULL,        NULL,       c.dropout, rng,       5};
  float *span = (float *)filled(c.z.size() * 4, 0);
  check(cudaMemcpy(span, c.z.data(), c.z.size() * 4, cudaMemcpyHostToDevice), "copy");
  a.span = span;
  for (int reach : r.reach) a.key_tiles += (reach + 63) / 64 + 1;
  a.stored_limit = stored_limit(seed);
  a.schedule = filled(vd_cuda_attention_schedule_size(), 0);
  void *table = filled(np * size_of(type), 0xff), *out = filled(nq * size_of(type), 0xff);
  float *lse = (float *)filled(nl * 4, 0xff),
        *dtable = (float *)filled(vd_cuda_attention_dtable_size(type, c.d_head, c.attn_span), 0),
        *dpe = (float *)filled(np * 4, 0);
  layer_arrays dx = {filled(shape.block_size() * size_of(type), 0xff),
                     filled(shape.memory_size() * size_of(type), 0xff)};
  a.dropout_mask = allocate_mask(a);
  if (vd_cuda_attention_splits_size(&a) > 0) a.splits = filled(vd_cuda_attention_splits_size(&a), 0xff);
  float *dspan = (float *)filled((size_t)c.n_span * 4, 0),
        *scratch = (float *)filled(vd_cuda_attention_workspace_size(&a), 0xff);
  check(vd_cuda_attention_key_pe(type, c.d_head, c.attn_span, gpe, table, 0), "key_pe");
  vd_cuda_attention_gradient g = {x.block, x.memory, table, out, lse, gdo, dx.block, dx.memory, dtable, dspan, scratch};
  run_kernels(a, g, out, lse);
  check(vd_cuda_attention_key_pe_backward(type, c.d_head, c.attn_span, dtable, dpe, 0), "key_pe_backward");
  check(cudaDeviceSynchronize(), "key_pe_backward");

  for (int b = 0; b < c.n_stream; b++)
    for (int h = 0; h < c.n_head; h++)
      for (int i = 0; i < c.block; i++) reference_row(c, rng, a.row0, b, h, i, q, k, v, pe, dout, &r);
  vec got_dq, got_dk, got_dv;
  printf("%-12s %s:", c.name, name_of(type));
  int bad = download(type, shape, dx, seen, &got_dq, &got_dk, &got_dv);
  bad += compare("out", fetch(type, out, nq), r.out, tolerance, 0);
  bad += compare("lse", fetch(VD_FP32, lse, nl), r.lse, tolerance, 0);
  bad += compare("dq", got_dq, r.dq, tolerance, 0);
  bad += compare("dk", got_dk, r.dk, tolerance, 0);
  bad += compare("dv", got_dv, r.dv, tolerance, 0);
  bad += compare("dkey_pe", fetch(VD_FP32, dpe, np), r.dkey_pe, tolerance, 0);
  bad += compare("dspan", fetch(VD_FP32, dspan, (size_t)c.n_span), r.dspan, tolerance,
                 type == VD_FP32 ? 0 : r.dspan_terms);
  printf("\n");
  void *all[] = {x.block, x.memory, gdo,      gpe,       span,  a.schedule, table,          out,     lse,
                 dtable,  dpe,      dx.block, dx.memory, dspan, scratch,    a.dropout_mask, a.splits};
  for (void *p : all) cudaFree(p);
  return bad;
}

/* One row of queries over distances 0 .. reach, as far as keys exist: forward, then backward. */
struct relative_reference {
  vec out, lse, dq, dk, dv, drel, du, dv_bias;
};
static void relative_row(const relative_case &c, vd_rng rng, int64_t row0, int b, int h, int i, const vec &q,
                         const vec &k, const vec &v, const vec &rel, const vec &u, const vec &w, const vec &dout,
                         relative_reference *r) {
  test_case numbers = {};
  numbers.attn_span = c.attn_span, numbers.block = c.block, numbers.n_head = c.n_head, numbers.dropout = c.dropout;
  int d = c.d_head, stride = c.n_head * d, rows = c.window + c.block;
  int n = std::min(c.reach, i + c.window) + 1;
  double scale = 1 / sqrt((double)d), keep = vd_dropout_scale(vd_dropout_threshold(c.dropout)), sum = 0,
         highest = -1e300;
  size_t query = (size_t)((b * c.block + i) * stride + h * d), bias = (size_t)(h * d);
  auto key = [&](int x) { return (size_t)((b * rows + c.window + i - x) * stride + h * d); };
  auto relative = [&](int x) { return (size_t)(x * stride + h * d); };
  vec s((size_t)n), da((size_t)n);
  for (int x = 0; x < n; x++) {
    for (int l = 0; l < d; l++)
      s[(size_t)x] += ((q[query + (size_t)l] + u[bias + (size_t)l]) * k[key(x) + (size_t)l] +
                       (q[query + (size_t)l] + w[bias + (size_t)l]) * rel[relative(x) + (size_t)l]) *
                      scale;
    highest = fmax(highest, s[(size_t)x]);
  }
  for (double x : s) sum += exp(x - highest);
  double lse = highest + log(sum), total = 0;
  r->lse[(size_t)((b * c.n_head + h) * c.block + i)] = lse;
  for (int x = 0; x < n; x++) {
    double drop = kept(numbers, rng, row0 + b, h, i, i - x) ? keep : 0, a = exp(s[(size_t)x] - lse);
    for (int l = 0; l < d; l++) {
      r->out[query + (size_t)l] += drop * a * v[key(x) + (size_t)l];
      r->dv[key(x) + (size_t)l] += drop * a * dout[query + (size_t)l];
      da[(size_t)x] += drop * dout[query + (size_t)l] * v[key(x) + (size_t)l];
    }
    total += a * da[(size_t)x];
  }
  for (int x = 0; x < n; x++) {
    double ds = exp(s[(size_t)x] - lse) * (da[(size_t)x] - total) * scale;
    for (int l = 0; l < d; l++) {
      size_t e = (size_t)l;
      double kx = k[key(x) + e], rx = rel[relative(x) + e], qe = q[query + e];
      r->dq[query + e] += ds * (kx + rx), r->du[bias + e] += ds * kx, r->dv_bias[bias + e] += ds * rx;
      r->dk[key(x) + e] += ds * (qe + u[bias + e]), r->drel[relative(x) + e] += ds * (qe + w[bias + e]);
    }
  }
}

/* The layer of a case, with its schedule, bias scores and dropout mask on the device. */
static vd_cuda_attention relative_layer(const relative_case &c, vd_precision type, uint64_t seed, const void *rel_key,
                                        const float *u, const float *v) {
  vd_cuda_attention a = {};
  a.type = type, a.n_stream = c.n_stream, a.block = c.block, a.window = c.window, a.n_head = c.n_head;
  a.d_head = c.d_head, a.attn_span = c.attn_span, a.rel_stride = c.n_head * c.d_head;
  a.kv_rows = c.window + c.memory_spare;
  a.dropout = c.dropout, a.rng = {1234567890123ULL + seed, 17, 3, VD_SITE_ATTENTION}, a.row0 = 5;
  a.rel_key = rel_key, a.reach = c.reach, a.stored_limit = stored_limit(seed);
  if (c.biases) a.content_bias = u, a.position_bias = v;
  a.schedule = filled(vd_cuda_attention_schedule_size(), 0);
  a.bias_scores = (float *)filled(vd_cuda_attention_bias_scores_size(&a), 0xff);
  a.dropout_mask = allocate_mask(a);
  return a;
}

static int run_relative(const relative_case &c, vd_precision type, double tolerance, uint64_t seed) {
  uint64_t state = seed;
  int stride = c.n_head * c.d_head, rows = c.window + c.block;
  const layer_shape shape = {c.n_stream, c.block, c.window, stride, c.memory_spare};
  size_t width = (size_t)stride, nq = (size_t)(c.n_stream * c.block) * width, nk = (size_t)(c.n_stream * rows) * width;
  size_t nr = (size_t)(c.reach + 1) * width, nl = (size_t)(c.n_stream * c.n_head * c.block);
  vec q, k, v, rel, u, w, dout;
  void *gdo = random_array(type, &dout, nq, 1, &state);
  random_values(type, &q, nq, &state), random_values(type, &k, nk, &state), random_values(type, &v, nk, &state);
  void *gr = random_array(type, &rel, nr, 1, &state);
  float *gu = (float *)random_array(VD_FP32, &u, width, c.biases, &state);
  float *gw = (float *)random_array(VD_FP32, &w, width, c.biases, &state);
  std::vector<bool> seen[2] = {std::vector<bool>(nk), std::vector<bool>(nk)};
  for (size_t i = 0; i < nk; i++) seen[0][i] = seen[1][i] = (int)(i / width) % rows >= c.window - c.reach;
  layer_arrays x = upload(type, shape, q, k, v, seen);

  vd_cuda_attention a = relative_layer(c, type, seed, gr, gu, gw);
  void *out = filled(nq * size_of(type), 0xff);
  layer_arrays dx = {filled(shape.block_size() * size_of(type), 0xff),
                     filled(shape.memory_size() * size_of(type) + 16, 0xff)};
  float *lse = (float *)filled(nl * 4, 0xff), *drel = (float *)filled(nr * 4, 0);
  float *du = (float *)filled(width * 4, 0), *dw = (float *)filled(width * 4, 0);
  void *scratch = filled(vd_cuda_attention_workspace_size(&a), 0xff);
  check(vd_cuda_attention_make_schedule(&a, 0), "make_schedule");
  vd_cuda_attention_gradient g = {};
  g.block = x.block, g.memory = x.memory, g.out = out, g.lse = lse, g.dout = gdo;
  g.dblock = dx.block, g.dmemory = dx.memory;
  g.drel_key = drel, g.workspace = scratch;
  if (c.biases) g.dcontent_bias = du, g.dposition_bias = dw;
  for (int twice = 0; twice < 2; twice++) { /* gradients are added to: they double; counters must be ready again */
    spoil_shared();
    check(vd_cuda_attention_forward(&a, x.block, x.memory, NULL, out, lse, 0), "forward");
    spoil_shared();
    check(vd_cuda_attention_backward(&a, &g, 0), "backward");
  }
  check(cudaDeviceSynchronize(), "kernels");

  relative_reference r = {vec(nq), vec(nl), vec(nq), vec(nk), vec(nk), vec(nr), vec(width), vec(width)};
  for (int b = 0; b < c.n_stream; b++)
    for (int h = 0; h < c.n_head; h++)
      for (int i = 0; i < c.block; i++) relative_row(c, a.rng, a.row0, b, h, i, q, k, v, rel, u, w, dout, &r);
  for (double &x : r.drel) x *= 2;
  for (double &x : r.du) x *= 2;
  for (double &x : r.dv_bias) x *= 2;
  vec got_dq, got_dk, got_dv;
  printf("%-12s %s:", c.name, name_of(type));
  int bad = download(type, shape, dx, seen, &got_dq, &got_dk, &got_dv);
  bad += compare("out", fetch(type, out, nq), r.out, tolerance, 0);
  bad += compare("lse", fetch(VD_FP32, lse, nl), r.lse, tolerance, 0);
  /* A query that sees one key has a gradient of zero but for rounding of what it is a difference of. */
  double alone = c.reach == 0 || c.window + c.block == 1 ? (double)nq : 0;
  bad += compare("dq", got_dq, r.dq, tolerance, alone);
  bad += compare("dk", got_dk, r.dk, tolerance, alone);
  bad += compare("dv", got_dv, r.dv, tolerance, 0);
  bad += compare("drel", fetch(VD_FP32, drel, nr), r.drel, tolerance, alone);
  if (c.biases) {
    bad += compare("du", fetch(VD_FP32, du, width), r.du, tolerance, alone);
    bad += compare("dv_bias", fetch(VD_FP32, dw, width), r.dv_bias, tolerance, alone);
  }
  printf("\n");
  void *all[] = {x.block, x.memory, gdo,      gr,        gu, gw, a.schedule, a.bias_scores, out,
                 lse,     drel,     dx.block, dx.memory, du, dw, scratch,    a.dropout_mask};
  for (void *p : all) cudaFree(p);
  return bad;
}

static bool wanted(int argc, char **argv, const char *name) {
  bool found = argc < 2;
  for (int i = 1; i < argc; i++) found = found || strcmp(argv[i], name) == 0;
  return found;
}

int main(int argc, char **argv) {
  /* Bounds: fp32, some hundred roundings of 6e-8; 16 bits, a few roundings of 2^-9 or 2^-12 in each product's operands.
   * The span's gradient is a sum of few terms of either sign, which may cancel: in 16 bits its error is compared with
   * the size of the terms, which share a row's rounding errors and are independent between rows. */
  const double tolerance[] = {1e-5, 2e-2, 2e-2};
  int bad = 0, n = 0;
  for (const test_case &c : cases)
    for (int type = VD_FP32; wanted(argc, argv, c.name) && type <= VD_FP16; type++, n++)
      bad += run_case(c, (vd_precision)type, tolerance[type - VD_FP32], (uint64_t)(n + 1) * 7919);
  for (const relative_case &c : relative_cases)
    for (int type = VD_FP32; wanted(argc, argv, c.name) && type <= VD_FP16; type++, n++)
      bad += run_relative(c, (vd_precision)type, tolerance[type - VD_FP32], (uint64_t)(n + 1) * 7919);
  printf("%d cases, %d quantities FAILED\n", n, bad);
  return bad > 0 || n == 0;
}
