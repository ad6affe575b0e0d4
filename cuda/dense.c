/* Dense products through cuBLASLt, and the linear layers made of them. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

enum { VD_BLAS_WORKSPACE = 64 << 20 };

/* What decides which of cuBLASLt's kernels serves a call; compared as bytes, so that it is zeroed before it is filled.
 */
typedef struct vd_product_key {
  int64_t m, n, k, n_batch, lda, ldb, ldc, stride_a, stride_b, stride_c;
  int32_t transposed, c_float, epilogue, align;
} vd_product_key;

struct vd_product {
  vd_product_key key;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatmulAlgo_t algo;
};

static cudaDataType_t data_type(enum vd_cuda_type type) {
  return type == VD_CUDA_FP32 ? CUDA_R_32F : type == VD_CUDA_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

static int alignment(const void *p) {
  size_t at = (size_t)p;
  int align = 256;
  while (at % (size_t)align != 0) align /= 2;
  return align;
}

static vd_product_key key_of(const vd_product_call *x) {
  vd_product_key key;
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

static cublasLtEpilogue_t epilogue_of(const vd_product_call *x) {
  if (x->bias) return x->relu ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
  return x->relu ? CUBLASLT_EPILOGUE_RELU : CUBLASLT_EPILOGUE_DEFAULT;
}

/* cuBLAS counts in columns: a row-major C = A B is the column-major C^T = B^T A^T, so that B comes first. */
static cublasStatus_t describe(const vd_cuda_backend *c, const vd_product_call *x, struct vd_product *p) {
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
  if (s == CUBLAS_STATUS_SUCCESS)
    s = make_layout(&p->a, type, x->b.transposed ? x->k : x->n, x->b.transposed ? x->n : x->k, x->b.ld, x->n_batch,
                    x->b.stride);
  if (s == CUBLAS_STATUS_SUCCESS)
    s = make_layout(&p->b, type, x->a.transposed ? x->m : x->k, x->a.transposed ? x->k : x->m, x->a.ld, x->n_batch,
                    x->a.stride);
  if (s == CUBLAS_STATUS_SUCCESS) s = make_layout(&p->c, c_type, x->n, x->m, x->ldc, x->n_batch, x->c_stride);
  return s;
}

static cublasStatus_t choose(const vd_cuda_backend *c, struct vd_product *p) {
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
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  if (s == CUBLAS_STATUS_SUCCESS)
    s = cublasLtMatmulAlgoGetHeuristic(c->blas, p->desc, p->a, p->b, p->c, p->c, preference, 1, &result, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  if (s == CUBLAS_STATUS_SUCCESS && found == 0) s = CUBLAS_STATUS_NOT_SUPPORTED;
  if (s == CUBLAS_STATUS_SUCCESS) p->algo = result.algo;
  return s;
}

static void forget(struct vd_product *p) {
  if (p->desc) cublasLtMatmulDescDestroy(p->desc);
  if (p->a) cublasLtMatrixLayoutDestroy(p->a);
  if (p->b) cublasLtMatrixLayoutDestroy(p->b);
  if (p->c) cublasLtMatrixLayoutDestroy(p->c);
}

/* Windows move during a run, and shapes with them: the cache starts anew when it is full. */
static struct vd_product *find(vd_cuda_backend *c, const vd_product_call *x) {
  vd_product_key key = key_of(x);
  for (int i = 0; i < c->n_product; i++)
    if (memcmp(&c->product[i].key, &key, sizeof key) == 0) return &c->product[i];
  if (!c->product) c->product = vd_calloc(VD_MAX_PRODUCTS, sizeof *c->product);
  if (c->n_product == VD_MAX_PRODUCTS) {
    for (int i = 0; i < c->n_product; i++) forget(&c->product[i]);
    c->n_product = 0;
  }
  struct vd_product *p = &c->product[c->n_product];
  memset(p, 0, sizeof *p);
  p->key = key;
  cublasStatus_t s = describe(c, x, p);
  if (s == CUBLAS_STATUS_SUCCESS) s = choose(c, p);
  if (s != CUBLAS_STATUS_SUCCESS) {
    vd_fail(&c->error, VD_FAILED, "GPU %d: cuBLASLt has no product of %lld x %lld x %lld (x %lld): %s", c->device,
            (long long)x->m, (long long)x->n, (long long)x->k, (long long)x->n_batch, cublasLtGetStatusString(s));
    forget(p);
    return NULL;
  }
  c->n_product++;
  return p;
}

void vd_cuda_product(vd_cuda_backend *c, const vd_product_call *x) {
  if (x->m == 0 || x->n == 0 || x->k == 0 || x->n_batch == 0) return;
  struct vd_product *p = find(c, x);
  void *workspace = vd_cuda_room(c, &c->blas_workspace, VD_BLAS_WORKSPACE);
  if (!p || !workspace) return;
  if (x->bias)
    cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, (const void *)&x->bias, sizeof x->bias);
  cublasStatus_t s = cublasLtMatmul(c->blas, p->desc, &x->alpha, x->b.p, p->a, x->a.p, p->b, &x->beta, x->c, p->c, x->c,
                                    p->c, &p->algo, workspace, VD_BLAS_WORKSPACE, c->stream);
  if (s != CUBLAS_STATUS_SUCCESS)
    vd_fail(&c->error, VD_FAILED, "GPU %d: a product of %lld x %lld x %lld failed: %s", c->device, (long long)x->m,
            (long long)x->n, (long long)x->k, cublasLtGetStatusString(s));
}

void vd_cuda_product_end(vd_cuda_backend *c) {
  for (int i = 0; i < c->n_product; i++) forget(&c->product[i]);
  free(c->product);
  if (c->blas) cublasLtDestroy(c->blas);
}

void vd_cuda_linear(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_product_call call = {.m = l->n,
                          .n = l->out,
                          .k = l->in,
                          .n_batch = 1,
                          .a = {x, l->in, 0, false},
                          .b = {vd_cuda_weight(c, weight), l->in, 0, true},
                          .c = y,
                          .ldc = l->out,
                          .alpha = 1,
                          .bias = bias ? vd_cuda_weight(c, bias) : NULL,
                          .relu = l->relu};
  vd_cuda_product(c, &call);
  if (!l->relu || l->dropout.p <= 0) return;
  vd_cuda_dropout drop = {l->dropout.p, l->dropout.rng, l->dropout.row0};
  vd_cuda_note(c, vd_cuda_drop_rows(c->type, l->n, l->out, &drop, y, c->stream), "dropout");
}

void vd_cuda_weight_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                             const void *x, real *dweight) {
  vd_product_call call = {.m = out,
                          .n = in,
                          .k = rows,
                          .n_batch = 1,
                          .a = {dy, ld, 0, true},
                          .b = {x, in, 0, false},
                          .c = dweight,
                          .ldc = in,
                          .c_float = true,
                          .alpha = 1,
                          .beta = 1};
  vd_cuda_product(c, &call);
}

void vd_cuda_input_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                            const real *weight, void *dx, bool accumulate) {
  vd_product_call call = {.m = rows,
                          .n = in,
                          .k = out,
                          .n_batch = 1,
                          .a = {dy, ld, 0, false},
                          .b = {vd_cuda_weight(c, weight), in, 0, false},
                          .c = dx,
                          .ldc = in,
                          .alpha = 1,
                          .beta = accumulate ? 1.0F : 0.0F};
  vd_cuda_product(c, &call);
}

void vd_cuda_linear_backward(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *y,
                             vd_act *dy, vd_act *dx, bool accumulate, real *dweight, real *dbias) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (l->relu || dbias) {
    float scale = l->dropout.p > 0 ? (float)vd_dropout_scale(vd_dropout_threshold(l->dropout.p)) : 1.0F;
    float *partial = vd_cuda_room(c, &c->partial, vd_cuda_rows_workspace(l->n, l->out));
    if (!partial) return;
    vd_cuda_note(c,
                 vd_cuda_relu_backward(c->type, l->n, l->out, l->relu ? y : NULL, scale, dy, dbias, partial, c->stream),
                 "bias gradient");
  }
  vd_cuda_weight_gradient(c, l->n, l->out, l->in, dy, l->out, x, dweight);
  if (dx) vd_cuda_input_gradient(c, l->n, l->out, l->in, dy, l->out, weight, dx, accumulate);
}
