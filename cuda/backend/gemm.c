/* See gemm.h: descriptors, the choice of an algorithm for each shape and its cache, the calls. */
#include "cuda/backend/gemm.h"
#include "cuda/kernels/rows_product.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { VD_BLAS_WORKSPACE = 32 << 20, VD_CANDIDATES = 8, VD_MAX_GEMMS = 256 };

/* Key of the algorithm cache. Compared by memcmp, so it is zeroed before it is filled. */
typedef struct vd_gemm_key {
  int64_t m, n, k, n_batch, lda, ldb, ldc, stride_a, stride_b, stride_c;
  int32_t transposed, c_float, epilogue, align;
} vd_gemm_key;

struct vd_gemm_algo {
  vd_gemm_key key;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, c;
  bool exists; /* cuBLASLt has an algorithm for it */
  cublasLtMatmulAlgo_t algo;
};

static cudaDataType_t data_type(enum vd_precision type) {
  return type == VD_FP32 ? CUDA_R_32F : type == VD_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

static int alignment(const void *p) {
  size_t at = (size_t)p;
  int align = 256;
  while (at % (size_t)align != 0) align /= 2;
  return align;
}

static vd_gemm_key key_of(const vd_gemm_call *x) {
  vd_gemm_key key;
  memset(&key, 0, sizeof key);
  key.m = x->m;
  key.n = x->n;
  key.k = x->k;
  key.n_batch = x->n_batch;
  key.lda = x->a.ld;
  key.ldb = x->b.ld;
  key.ldc = x->ldc;
  key.stride_a = x->a.stride;
  key.stride_b = x->b.stride;
  key.stride_c = x->c_stride;
  key.transposed = x->a.transposed + 2 * x->b.transposed + 4 * (x->beta != 0);
  key.c_float = x->c_float;
  key.epilogue = (x->bias != NULL) + 2 * x->relu;
  int align = alignment(x->a.p), b = alignment(x->b.p), c = alignment(x->c);
  key.align = align < b ? (align < c ? align : c) : (b < c ? b : c);
  return key;
}

static cublasStatus_t make_layout(cublasLtMatrixLayout_t *layout, cudaDataType_t type, int64_t rows, int64_t columns,
                                  int64_t ld, int64_t n_batch, int64_t stride) {
  int32_t count = (int32_t)n_batch;
  cublasStatus_t s = cublasLtMatrixLayoutCreate(layout, type, (uint64_t)rows, (uint64_t)columns, ld);
  if (s == CUBLAS_STATUS_SUCCESS && n_batch > 1) {
    s = cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
    if (s == CUBLAS_STATUS_SUCCESS)
      s = cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                           sizeof stride);
  }
  return s;
}

static cublasLtEpilogue_t epilogue_of(const vd_gemm_call *x) {
  if (x->bias) return x->relu ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
  return x->relu ? CUBLASLT_EPILOGUE_RELU : CUBLASLT_EPILOGUE_DEFAULT;
}

/* Sets the bias pointer, which differs from call to call. */
static cublasStatus_t set_bias(const vd_gemm_call *x, struct vd_gemm_algo *p) {
  if (!x->bias) return CUBLAS_STATUS_SUCCESS;
  return cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, (const void *)&x->bias,
                                        sizeof x->bias);
}

/* cuBLASLt is column-major: the row-major C = A B is its C^T = B^T A^T, so that B comes first. */
static cublasStatus_t describe(const vd_cuda_backend *c, const vd_gemm_call *x, struct vd_gemm_algo *p) {
  cudaDataType_t type = data_type(c->type), c_type = x->c_float ? CUDA_R_32F : type;
  cublasOperation_t first = x->b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasOperation_t second = x->a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = epilogue_of(x);
  cublasStatus_t s = cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  if (s == CUBLAS_STATUS_SUCCESS) s = set_bias(x, p);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = make_layout(&p->a, type, x->b.transposed ? x->k : x->n, x->b.transposed ? x->n : x->k, x->b.ld, x->n_batch,
                    x->b.stride);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = make_layout(&p->b, type, x->a.transposed ? x->m : x->k, x->a.transposed ? x->k : x->m, x->a.ld, x->n_batch,
                    x->a.stride);
  if (s == CUBLAS_STATUS_SUCCESS) s = make_layout(&p->c, c_type, x->n, x->m, x->ldc, x->n_batch, x->c_stride);
  return s;
}

static cublasStatus_t multiply(const vd_cuda_backend *c, const vd_gemm_call *x, const struct vd_gemm_algo *p,
                               const cublasLtMatmulAlgo_t *algo, void *d, bool beside) {
  return cublasLtMatmul(c->blas, p->desc, &x->alpha, x->b.p, p->a, x->a.p, p->b, &x->beta, x->c, p->c, d, p->c, algo,
                        beside ? c->gradient.blas_workspace.p : c->blas_workspace.p, VD_BLAS_WORKSPACE,
                        beside ? c->gradient.stream : c->stream);
}

/* Milliseconds of a call: the mean of VD_RUNS calls, the least of VD_ROWS such means. NAN where the algorithm fails. */
static double time_of(const vd_cuda_backend *c, const vd_gemm_call *x, const struct vd_gemm_algo *p,
                      const cublasLtMatmulAlgo_t *algo, void *d, cudaEvent_t event[2]) {
  enum { VD_RUNS = 4, VD_ROWS = 3 };
  double least = NAN;
  if (multiply(c, x, p, algo, d, false) != CUBLAS_STATUS_SUCCESS) return NAN;
  for (int row = 0; row < VD_ROWS; row++) {
    float ms = 0;
    cudaEventRecord(event[0], c->stream);
    for (int i = 0; i < VD_RUNS; i++)
      if (multiply(c, x, p, algo, d, false) != CUBLAS_STATUS_SUCCESS) return NAN;
    cudaEventRecord(event[1], c->stream);
    if (cudaEventSynchronize(event[1]) != cudaSuccess || cudaEventElapsedTime(&ms, event[0], event[1]) != cudaSuccess)
      return NAN;
    if (!(ms / VD_RUNS >= least)) least = ms / VD_RUNS;
  }
  return least;
}

/* cuBLASLt orders its kernels by a heuristic. This times the candidates on the operands of the first call, writing into
 * a temporary buffer, and replaces the first only by one that is faster by more than the noise of a measurement. Each
 * candidate gives the same bits on every call: by cublasLt.h, split-K reductions run in sequence or as a separate step.
 * Two candidates may differ in rounding, and so may two processes whose timings choose differently. */
static int fastest(const vd_cuda_backend *c, const vd_gemm_call *x, const struct vd_gemm_algo *p,
                   const cublasLtMatmulHeuristicResult_t *result, int n) {
  enum { VD_SMALL = 1 << 26 }; /* for smaller products the choice saves too little */
  int best = 0;
  void *d = NULL;
  cudaEvent_t event[2] = {NULL, NULL};
  size_t size = x->c_float ? sizeof(float) : c->act_size;
  size_t elements = (size_t)((x->n_batch - 1) * x->c_stride + (x->m - 1) * x->ldc + x->n);
  if (n < 2 || (double)x->m * (double)x->n * (double)x->k * (double)x->n_batch < VD_SMALL) return 0;
  if (cudaMalloc(&d, elements * size) == cudaSuccess && cudaEventCreate(&event[0]) == cudaSuccess &&
      cudaEventCreate(&event[1]) == cudaSuccess) {
    cudaStreamSynchronize(c->gradient.stream); /* nothing runs beside what is timed */
    double least = time_of(c, x, p, &result[0].algo, d, event) * 0.97;
    for (int i = 1; i < n; i++) {
      if (result[i].state != CUBLAS_STATUS_SUCCESS) continue;
      double ms = time_of(c, x, p, &result[i].algo, d, event);
      if (!(ms < least)) continue;
      least = ms;
      best = i;
    }
  }
  if (event[0]) cudaEventDestroy(event[0]);
  if (event[1]) cudaEventDestroy(event[1]);
  cudaFree(d);
  cudaGetLastError(); /* out of memory for the trial: the first candidate */
  return best;
}

static cublasStatus_t candidates(const vd_cuda_backend *c, const struct vd_gemm_algo *p,
                                 cublasLtMatmulHeuristicResult_t result[VD_CANDIDATES], int *found) {
  cublasLtMatmulPreference_t preference;
  size_t bytes = VD_BLAS_WORKSPACE;
  uint32_t align = (uint32_t)p->key.align;
  const cublasLtMatmulPreferenceAttributes_t aligned[] = {
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  cublasStatus_t s = cublasLtMatmulPreferenceCreate(&preference);
  if (s != CUBLAS_STATUS_SUCCESS) return s;
  s = cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
  for (int i = 0; i < 4 && s == CUBLAS_STATUS_SUCCESS; i++)
    s = cublasLtMatmulPreferenceSetAttribute(preference, aligned[i], &align, sizeof align);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = cublasLtMatmulAlgoGetHeuristic(c->blas, p->desc, p->a, p->b, p->c, p->c, preference, VD_CANDIDATES, result,
                                       found);
  cublasLtMatmulPreferenceDestroy(preference);
  if (s == CUBLAS_STATUS_SUCCESS && *found == 0) s = CUBLAS_STATUS_NOT_SUPPORTED;
  return s;
}

static cublasStatus_t choose(const vd_cuda_backend *c, const vd_gemm_call *x, struct vd_gemm_algo *p) {
  cublasLtMatmulHeuristicResult_t result[VD_CANDIDATES];
  int found = 0;
  cublasStatus_t s = candidates(c, p, result, &found);
  if (s == CUBLAS_STATUS_SUCCESS) p->algo = result[fastest(c, x, p, result, found)].algo;
  return s;
}

static void free_algo(struct vd_gemm_algo *p) {
  if (p->desc) cublasLtMatmulDescDestroy(p->desc);
  if (p->a) cublasLtMatrixLayoutDestroy(p->a);
  if (p->b) cublasLtMatrixLayoutDestroy(p->b);
  if (p->c) cublasLtMatrixLayoutDestroy(p->c);
}

/* The algorithm of a call's shape, from the cache. Shapes change with the windows during a run, so a full cache is
 * emptied. Shapes that cuBLASLt does not support are cached, too. */
static struct vd_gemm_algo *find(vd_cuda_backend *c, const vd_gemm_call *x) {
  vd_gemm_key key = key_of(x);
  for (int i = 0; i < c->n_product; i++)
    if (memcmp(&c->product[i].key, &key, sizeof key) == 0) return &c->product[i];
  if (!c->product) c->product = vd_calloc(VD_MAX_GEMMS, sizeof *c->product);
  if (c->n_product == VD_MAX_GEMMS) {
    for (int i = 0; i < c->n_product; i++) free_algo(&c->product[i]);
    c->n_product = 0;
  }
  struct vd_gemm_algo *p = &c->product[c->n_product];
  memset(p, 0, sizeof *p);
  p->key = key;
  p->exists = describe(c, x, p) == CUBLAS_STATUS_SUCCESS && choose(c, x, p) == CUBLAS_STATUS_SUCCESS;
  c->n_product++;
  return p;
}

/* Whether there is a kernel of ours for the call: then fills p. */
static bool as_rows_product(const vd_cuda_backend *c, const vd_gemm_call *x, vd_rows_product *p) {
  const bool plain = x->n_batch == 1 && !x->gradient && !x->c_float && !x->bias && !x->relu && !x->a.transposed;
  if (!plain || x->alpha != 1 || x->beta != 0 || x->b.ld != (x->b.transposed ? x->k : x->n)) return false;
  *p = (vd_rows_product){.n = x->m,
                         .d = x->k,
                         .width = x->n,
                         .x = x->a.p,
                         .weight = x->b.p,
                         .x_stride = x->a.ld,
                         .across = !x->b.transposed,
                         .out = x->c,
                         .out_stride = x->ldc};
  return vd_cuda_rows_product_supports(c->type, p);
}

void vd_cuda_gemm(vd_cuda_backend *c, const vd_gemm_call *x) {
  vd_rows_product product;
  if (x->m == 0 || x->n == 0 || x->k == 0 || x->n_batch == 0) return;
  if (as_rows_product(c, x, &product)) {
    vd_cuda_record_error(c, vd_cuda_rows_product(c->type, &product, c->stream), "a weight-stationary product");
    return;
  }
  const bool beside = x->gradient && !c->one_stream;
  if (!vd_cuda_workspace(c, &c->blas_workspace, VD_BLAS_WORKSPACE)) return;
  if (beside && !vd_cuda_workspace(c, &c->gradient.blas_workspace, VD_BLAS_WORKSPACE)) return;
  struct vd_gemm_algo *p = find(c, x);
  cublasStatus_t s = p->exists ? set_bias(x, p) : CUBLAS_STATUS_NOT_SUPPORTED;
  if (s == CUBLAS_STATUS_SUCCESS) s = multiply(c, x, p, &p->algo, x->c, beside);
  if (s != CUBLAS_STATUS_SUCCESS)
    vd_fail(&c->error, VD_FAILED, "GPU %d: a matrix product of %lld x %lld x %lld (x %lld) failed: %s", c->device,
            (long long)x->m, (long long)x->n, (long long)x->k, (long long)x->n_batch, cublasLtGetStatusString(s));
}

static void weight_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                            /* NOLINTNEXTLINE(readability-non-const-parameter): written through a struct */
                            const void *x, real *dweight, bool beside) {
  vd_gemm_call call = {.m = out,
                       .n = in,
                       .k = rows,
                       .n_batch = 1,
                       .a = {dy, ld, 0, true},
                       .b = {x, in, 0, false},
                       .c = dweight,
                       .ldc = in,
                       .c_float = true,
                       .alpha = 1,
                       .beta = 1,
                       .gradient = beside};
  vd_cuda_gemm(c, &call);
}

void vd_cuda_weight_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                             const void *x, real *dweight) {
  weight_gradient(c, rows, out, in, dy, ld, x, dweight, true);
}

void vd_cuda_main_weight_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                                  const void *x, real *dweight) {
  weight_gradient(c, rows, out, in, dy, ld, x, dweight, false);
}

void vd_cuda_input_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                            const real *weight, void *dx, bool accumulate) {
  vd_gemm_call call = {.m = rows,
                       .n = in,
                       .k = out,
                       .n_batch = 1,
                       .a = {dy, ld, 0, false},
                       .b = {vd_cuda_weight(c, weight), in, 0, false},
                       .c = dx,
                       .ldc = in,
                       .alpha = 1,
                       .beta = accumulate ? 1.0F : 0.0F};
  vd_cuda_gemm(c, &call);
}

void vd_cuda_gemm_end(vd_cuda_backend *c) {
  for (int i = 0; i < c->n_product; i++) free_algo(&c->product[i]);
  free(c->product);
  if (c->blas) cublasLtDestroy(c->blas);
}
