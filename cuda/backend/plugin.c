/* The CUDA backend's table of operations: memory, copies, the simple ops, creation and destruction. */
#include "cuda/backend/plugin.h"

#include "cuda/backend/attention_ops.h"
#include "cuda/backend/gemm.h"
#include "cuda/backend/gradient_stream.h"
#include "cuda/backend/linear.h"
#include "cuda/backend/optimizer_ops.h"
#include "cuda/backend/pinned.h"
#include "cuda/backend/row_sums.h"
#include "cuda/backend/symmetric_memory.h"
#include "cuda/backend/timing.h"
#include "cuda/backend/transformer_xl_ops.h"

#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int cuda_alloc(vd_ops *o, size_t bytes, void **p, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  size_t size = bytes > 0 ? bytes : 1, free_bytes = 0, total = 0;
  cudaError_t e = c->pooled ? cudaMallocAsync(p, size, c->stream) : cudaMalloc(p, size);
  if (e != cudaSuccess && vd_cuda_trim_pool(c)) e = cudaMallocAsync(p, size, c->stream);
  if (e != cudaSuccess) {
    cudaGetLastError(); /* clears cudaErrorMemoryAllocation, which later calls would report */
    cudaMemGetInfo(&free_bytes, &total);
    return vd_fail(err, VD_FAILED, "GPU %d: no memory for %.1f MiB (%.1f MiB of %.1f are free): %s", c->device,
                   (double)bytes / 1048576.0, (double)free_bytes / 1048576.0, (double)total / 1048576.0,
                   cudaGetErrorString(e));
  }
  vd_cuda_record_error(c, cudaMemsetAsync(*p, 0, size, c->stream), "zeroing memory");
  return VD_OK;
}

static int cuda_alloc_arena(vd_ops *o, size_t bytes, void **p, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (!c->symmetric) return cuda_alloc(o, bytes, p, err);
  if (vd_cuda_symmetric_alloc(c, p, bytes, err)) return err->status;
  vd_cuda_record_error(c, cudaMemsetAsync(*p, 0, bytes, c->stream), "zeroing memory");
  return VD_OK;
}

static void free_copy(vd_cuda_backend *c, const vd_arena *a) {
  if (!vd_cuda_symmetric_free(c, a->copy)) cudaFree(a->copy);
}

static void cuda_free(vd_ops *o, void *p) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (!p) return;
  for (int i = 0; i < c->n_arena; i++)
    if (c->arena[i].params == p) {
      free_copy(c, &c->arena[i]);
      c->arena[i] = c->arena[--c->n_arena];
    }
  vd_cuda_gradient_join(c);
  /* Schedules and tables are found by address: none may be found by what is allocated here next. */
  vd_cuda_attention_changed(c);
  if (!vd_cuda_symmetric_free(c, p))
    vd_cuda_record_error(c, c->pooled ? cudaFreeAsync(p, c->stream) : cudaFree(p), "freeing memory");
  c->freed = true;
}

static void cuda_zero(vd_ops *o, void *p, size_t bytes) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_record_error(c, cudaMemsetAsync(p, 0, bytes, c->stream), "zeroing memory");
}

static void copy_in(vd_cuda_backend *c, void *device, const void *host, size_t bytes) {
  vd_cuda_gradient_join(c);
  vd_cuda_record_error(c, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, c->stream),
                       "copying to the GPU");
}

/* Copies through pinned memory, in pieces. Waits. */
static void copy_out(vd_cuda_backend *c, void *host, const void *device, size_t bytes) {
  enum { PIECE = 1 << 24 };
  vd_cuda_gradient_join(c);
  char *stage = vd_cuda_workspace(c, &c->pinned, bytes < PIECE ? bytes : PIECE);
  if (!stage) return;
  for (size_t at = 0; at < bytes; at += PIECE) {
    size_t n = bytes - at < PIECE ? bytes - at : PIECE;
    vd_cuda_record_error(c, cudaMemcpyAsync(stage, (const char *)device + at, n, cudaMemcpyDeviceToHost, c->stream),
                         "copying from the GPU");
    cudaError_t e = cudaStreamSynchronize(c->stream);
    vd_cuda_record_error(c, e, "waiting for the GPU");
    if (e != cudaSuccess) return;
    memcpy((char *)host + at, stage, n);
  }
}

static void cuda_put(vd_ops *o, real *device, const real *host, size_t n) {
  vd_arena *a = vd_cuda_arena_of(vd_cuda_of(o), device);
  if (a) a->fresh = false;
  if (a) vd_cuda_attention_changed(vd_cuda_of(o));
  copy_in(vd_cuda_of(o), device, host, n * sizeof *host);
}
static void cuda_get(vd_ops *o, real *host, const real *device, size_t n) {
  copy_out(vd_cuda_of(o), host, device, n * sizeof *host);
}
static void cuda_get_double(vd_ops *o, double *host, const double *device, size_t n) {
  copy_out(vd_cuda_of(o), host, device, n * sizeof *host);
}

/* Activations are converted on the GPU, at most VD_CONVERT elements at a time. */
enum { VD_CONVERT = 1 << 22 };

static void cuda_put_act(vd_ops *o, vd_act *device, const real *host, size_t n) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (c->type == VD_FP32) {
    copy_in(c, device, host, n * sizeof *host);
    return;
  }
  for (size_t at = 0; at < n; at += VD_CONVERT) {
    size_t piece = n - at < VD_CONVERT ? n - at : VD_CONVERT;
    float *stage = vd_cuda_workspace(c, &c->scratch, piece * sizeof *stage);
    if (!stage) return;
    copy_in(c, stage, host + at, piece * sizeof *stage);
    vd_cuda_record_error(c, vd_cuda_from_float(c->type, piece, stage, (char *)device + at * c->act_size, c->stream),
                         "converting activations");
  }
}

static void cuda_get_act(vd_ops *o, real *host, const vd_act *device, size_t n) {
  vd_cuda_backend *c = vd_cuda_of(o);
  for (size_t at = 0; at < n; at += VD_CONVERT) {
    size_t piece = n - at < VD_CONVERT ? n - at : VD_CONVERT;
    float *stage = vd_cuda_workspace(c, &c->scratch, piece * sizeof *stage);
    if (!stage) return;
    vd_cuda_record_error(c, vd_cuda_to_float(c->type, piece, (const char *)device + at * c->act_size, stage, c->stream),
                         "converting activations");
    copy_out(c, host + at, stage, piece * sizeof *stage);
  }
}

static int cuda_check(vd_ops *o, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (c->error.status != VD_OK) vd_fail(err, c->error.status, "%s", c->error.message);
  c->error = (vd_error){0};
  return err->status;
}

static int cuda_synchronize(vd_ops *o, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_gradient_join(c);
  vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting for the GPU");
  /* A caller that waits can afford to return the pool's free memory, which windows that grew have left. */
  if (c->pooled && c->freed) vd_cuda_record_error(c, cudaMemPoolTrimTo(c->pool, 0), "trimming the memory pool");
  c->freed = false;
  return cuda_check(o, err);
}

/* Errors are recorded. */
static int take_copy(vd_cuda_backend *c, vd_arena *a) {
  size_t bytes = a->n * c->act_size;
  if (c->symmetric) return vd_cuda_symmetric_alloc(c, &a->copy, bytes, &c->error);
  cudaError_t e = cudaMalloc(&a->copy, bytes);
  vd_cuda_record_error(c, e, "allocating the copy of the parameters");
  return e == cudaSuccess ? VD_OK : VD_FAILED;
}

static void cuda_weights_changed(vd_ops *o, const real *params, size_t n) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_attention_changed(c);
  if (c->type == VD_FP32) return;
  vd_arena *a = vd_cuda_arena_of(c, params);
  if (!a) {
    if (c->n_arena == VD_MAX_ARENAS) vd_bug("more than %d parameter arenas", VD_MAX_ARENAS);
    a = &c->arena[c->n_arena++];
    *a = (vd_arena){.params = params, .n = n};
    if (take_copy(c, a)) {
      c->n_arena--;
      return;
    }
  }
  bool fresh = a->fresh;
  a->fresh = false;
  if (!fresh)
    vd_cuda_record_error(c, vd_cuda_from_float(c->type, n, params, a->copy, c->stream), "copying the parameters");
}

static void cuda_embed(vd_ops *o, int64_t n, int64_t d, const int32_t *tokens, const real *weight,
                       const vd_dropout *dropout, vd_act *out) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_record_error(c, vd_cuda_embed(c->type, n, d, tokens, weight, dropout, out, c->stream), "embed");
}

static void cuda_add_norm(vd_ops *o, int64_t n, int64_t d, const vd_act *a, const vd_act *b, const vd_dropout *dropped,
                          const real *weight, const real *bias, vd_act *sum, real *mean, real *rstd, vd_act *y) {
  vd_cuda_backend *c = vd_cuda_of(o);
  bool draws = c->mask_state == VD_MASK_WANTED && c->unit_mask.n == n && d % 8 == 0;
  vd_cuda_record_error(c,
                       vd_cuda_add_norm(c->type, n, d, a, b, dropped, weight, bias, sum, mean, rstd, y,
                                        draws ? &c->unit_mask : NULL, c->stream),
                       "layer norm");
  c->mask_state = draws ? VD_MASK_DRAWN : VD_NO_MASK;
}

static void cuda_add_norm_backward(vd_ops *o, int64_t n, int64_t d, const vd_act *sum, const real *mean,
                                   const real *rstd, const real *weight, const vd_act *dy, vd_act *dsum, real *dweight,
                                   real *dbias, real *dshift) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const int64_t rows = vd_cuda_norm_partials(n);
  float *partial = vd_cuda_row_partials(c, rows, 3 * d);
  vd_cuda_gradient_release(c, dsum);
  if (!partial) return;
  vd_cuda_record_error(c,
                       vd_cuda_add_norm_backward(c->type, n, d, sum, mean, rstd, weight, dy, dsum, partial, c->stream),
                       "layer norm backward");
  real *const to[] = {dweight, dbias, dshift};
  vd_cuda_row_sum_later(c, partial, rows, 3 * d, d, dshift ? 3 : 2, to);
}

static void cuda_memory_push(vd_ops *o, int64_t n_stream, int64_t d, const vd_act *old, int64_t rows_old,
                             int64_t oldest, const vd_act *hidden, int64_t block, vd_act *memory, int64_t rows_new) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_record_error(
      c, vd_cuda_memory_push(c->type, n_stream, d, old, rows_old, oldest, hidden, block, memory, rows_new, c->stream),
      "memory push");
}

static void cuda_memory_ring_push(vd_ops *o, int64_t n_stream, int64_t d, int64_t stride, int64_t block, int n,
                                  const vd_ring_push *push) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_record_error(c, vd_cuda_memory_ring_push(c->type, n_stream, d, stride, block, n, push, c->stream),
                       "memory ring push");
}

static void cuda_cross_entropy(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                               const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits) {
  vd_cuda_backend *c = vd_cuda_of(o);
  float *rows = nll ? nll : vd_cuda_workspace(c, &c->scratch, (size_t)n * sizeof *rows);
  if (rows)
    vd_cuda_record_error(c,
                         vd_cuda_cross_entropy(c->type, n, vocab, stride, logits, targets, (float)scale, loss_sum, rows,
                                               dlogits, c->stream),
                         "cross entropy");
}

static void cuda_add_constant(vd_ops *o, real *x, size_t n, double value) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_record_error(c, vd_cuda_add_constant(x, n, (float)value, c->stream), "add constant");
}

static void cuda_clamp01(vd_ops *o, real *x, size_t n) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_record_error(c, vd_cuda_clamp01(x, n, c->stream), "clamp");
}

/* NVTX ranges are on the host's timeline; a profiler projects them onto the GPU's. */
static void cuda_phase(vd_ops *o, const char *name) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (c->in_phase) nvtxRangePop();
  c->in_phase = name != NULL;
  if (name) nvtxRangePushA(name);
}

static void cuda_destroy(vd_ops *o) {
  vd_cuda_backend *c = vd_cuda_of(o);
  cudaStreamSynchronize(c->stream);
  vd_cuda_attention_end(c);
  vd_cuda_optimizer_end(c);
  vd_cuda_pinned_end(c);
  vd_cuda_gradient_end(c);
  vd_cuda_gemm_end(c);
  vd_cuda_timing_end(c);
  for (int i = 0; i < c->n_arena; i++) free_copy(c, &c->arena[i]);
  vd_cuda_symmetric_end(c);
  cudaFree(c->scratch.p);
  cudaFree(c->partial.p);
  cudaFree(c->row_sums.partial.p);
  cudaFree(c->mask.p);
  cudaFree(c->blas_workspace.p);
  cudaFreeHost(c->pinned.p);
  cudaEventDestroy(c->fork);
  cudaEventDestroy(c->join);
  cudaStreamDestroy(c->side);
  cudaStreamDestroy(c->stream);
  free(c);
  free(o);
}

static vd_ops table_of(vd_cuda_backend *c) {
  return (vd_ops){.name = "cuda",
                  .act_size = c->act_size,
                  .max_streams = VD_CUDA_MAX_STREAMS,
                  .max_block = vd_cuda_max_block,
                  .memory_is_remote = true,
                  .self = c,
                  .alloc = cuda_alloc,
                  .alloc_arena = cuda_alloc_arena,
                  .free = cuda_free,
                  .zero = cuda_zero,
                  .zero_gradients = vd_cuda_zero_gradients,
                  .put = cuda_put,
                  .get = cuda_get,
                  .put_tokens = vd_cuda_put_tokens,
                  .put_act = cuda_put_act,
                  .get_act = cuda_get_act,
                  .get_double = cuda_get_double,
                  .push_stats = vd_cuda_push_stats,
                  .pull_stats = vd_cuda_pull_stats,
                  .check = cuda_check,
                  .synchronize = cuda_synchronize,
                  .destroy = cuda_destroy,
                  .phase = cuda_phase,
                  .weights_changed = cuda_weights_changed,
                  .embed = cuda_embed,
                  .embed_backward = vd_cuda_embed_backward_op,
                  .linear = vd_cuda_linear,
                  .linear_backward = vd_cuda_linear_backward,
                  .draw_ahead = vd_cuda_draw_ahead,
                  .add_norm = cuda_add_norm,
                  .add_norm_backward = cuda_add_norm_backward,
                  .attention_schedule = vd_cuda_attention_schedule_op,
                  .attention_project = vd_cuda_attention_project,
                  .attention_project_backward = vd_cuda_attention_project_backward,
                  .attention = vd_cuda_attention_op,
                  .attention_backward = vd_cuda_attention_backward_op,
                  .backward_end = vd_cuda_backward_end,
                  .memory_push = cuda_memory_push,
                  .memory_ring_push = cuda_memory_ring_push,
                  .cross_entropy = cuda_cross_entropy,
                  .add_constant = cuda_add_constant,
                  .square_sums = vd_cuda_square_sums_op,
                  .gradient_norms = vd_cuda_gradient_norms_op,
                  .gradient_stats = vd_cuda_gradient_stats_op,
                  .adagrad = vd_cuda_adagrad_op,
                  .adam = vd_cuda_adam_op,
                  .clamp01 = cuda_clamp01,
                  .scale_dropout = vd_cuda_scale_dropout_op,
                  .position_encodings = vd_cuda_position_encodings_op,
                  .weight_gradient = vd_cuda_weight_gradient_op};
}

/* The model's memory comes from a pool that keeps freed memory until the next synchronize (a validation) or a failed
 * allocation, so that neither host nor GPU waits when windows move. */
static cudaError_t open_pool(vd_cuda_backend *c) {
  int has = 0;
  uint64_t all = UINT64_MAX;
  cudaError_t e = cudaDeviceGetAttribute(&has, cudaDevAttrMemoryPoolsSupported, c->device);
  if (e != cudaSuccess || !has) return e;
  e = cudaDeviceGetDefaultMemPool(&c->pool, c->device);
  if (e == cudaSuccess) e = cudaMemPoolSetAttribute(c->pool, cudaMemPoolAttrReleaseThreshold, &all);
  c->pooled = e == cudaSuccess;
  return e;
}

/* Blocks of the main and the side stream are scheduled before those of the gradient stream, which has the least
 * priority, and after NCCL's. */
static cudaError_t create_streams(vd_cuda_backend *c) {
  int least = 0, greatest = 0;
  cudaError_t e = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  const int priority = greatest < least ? least - 1 : least;
  if (e == cudaSuccess) e = cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, priority);
  return e == cudaSuccess ? cudaStreamCreateWithPriority(&c->side, cudaStreamNonBlocking, priority) : e;
}

int vd_cuda_ops(vd_ops **o, int device, enum vd_precision precision, vd_error *err) {
  vd_cuda_backend *c = vd_calloc(1, sizeof *c);
  c->device = device;
  c->type = precision;
  c->act_size = precision == VD_FP32 ? 4 : 2;
  cudaError_t e = cudaSetDevice(device);
  if (e == cudaSuccess) e = create_streams(c);
  if (e == cudaSuccess) e = cudaEventCreateWithFlags(&c->fork, cudaEventDisableTiming);
  if (e == cudaSuccess) e = cudaEventCreateWithFlags(&c->join, cudaEventDisableTiming);
  if (e == cudaSuccess) e = vd_cuda_gradient_create(c);
  if (e == cudaSuccess) e = open_pool(c);
  bool blas = e == cudaSuccess && cublasLtCreate(&c->blas) == CUBLAS_STATUS_SUCCESS;
  vd_ops *ops = vd_calloc(1, sizeof *ops);
  *ops = table_of(c);
  *o = ops;
  if (blas) return VD_OK;
  cuda_destroy(ops);
  *o = NULL;
  if (e != cudaSuccess) return vd_fail(err, VD_FAILED, "GPU %d: %s", device, cudaGetErrorString(e));
  return vd_fail(err, VD_FAILED, "GPU %d: cublasLtCreate failed", device);
}
