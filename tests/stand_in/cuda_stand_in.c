/* What cuda/backend/nccl.c and symmetric_memory.c call of CUDA's runtime and of the rest of cuda/backend. Device memory
 * is the host's; work on streams is done at once. */
#include "cuda/backend/context.h"
#include "cuda/backend/gradient_stream.h"
#include "tests/stand_in/stand_in.h"

#include <stdlib.h>
#include <string.h>

enum { MOST = 64 };
struct objects {
  void *memory[MOST];
  int live;
};
static struct objects *objects(void) {
  static struct objects all;
  return &all;
}

void *stand_in_device_memory(size_t bytes) {
  for (int i = 0; i < MOST; i++)
    if (!objects()->memory[i]) {
      objects()->live++;
      return objects()->memory[i] = vd_calloc(bytes, 1);
    }
  vd_bug("more than %d objects", MOST);
}
int stand_in_live(void) {
  return objects()->live;
}
static bool is_device_memory(const void *p, int *at) {
  for (*at = 0; *at < MOST; ++*at)
    if (p && objects()->memory[*at] == p) return true;
  return false;
}

/* The headers have other names for parameters, and parameters that could be const. */
/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name,readability-non-const-parameter) */
cudaError_t cudaMalloc(void **p, size_t bytes) {
  *p = stand_in_device_memory(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
  int at;
  if (!p) return cudaSuccess;
  if (!is_device_memory(p, &at)) return cudaErrorInvalidValue;
  objects()->memory[at] = NULL;
  objects()->live--;
  free(p);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  int at;
  memset(a, 0, sizeof *a);
  a->type = is_device_memory(p, &at) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  (void)kind;
  memcpy(to, from, bytes);
  return cudaSuccess;
}

static void *make(void) {
  objects()->live++;
  return vd_calloc(1, 1);
}
static cudaError_t unmake(void *object) {
  objects()->live--;
  free(object);
  return cudaSuccess;
}
static cudaError_t known(const void *object) {
  return object ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) {
  *e = make();
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
  (void)flags;
  return cudaEventCreate(e);
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  return unmake(e);
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return known(s) == cudaSuccess ? known(e) : known(s);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  *ms = 1;
  return known(from) == cudaSuccess ? known(to) : known(from);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  (void)flags, (void)priority;
  *s = make();
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
  return unmake(s);
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  return known(s);
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  return known(s);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
  (void)flags;
  return known(s) == cudaSuccess ? known(e) : known(s);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "an error";
}
cudaError_t cudaGetLastError(void) {
  return cudaSuccess;
}

cudaError_t vd_cuda_gradient_wait(vd_cuda_backend *c, cudaStream_t stream) {
  (void)c;
  return known(stream);
}
void vd_cuda_record_error(vd_cuda_backend *c, cudaError_t e, const char *what) {
  if (e != cudaSuccess) vd_fail(&c->error, VD_FAILED, "%s", what);
}
bool vd_cuda_trim_pool(vd_cuda_backend *c) {
  return c->pooled;
}
vd_arena *vd_cuda_arena_of(vd_cuda_backend *c, const real *p) {
  return c->n_arena > 0 && c->arena[0].params == p ? &c->arena[0] : NULL;
}
/* NOLINTEND(readability-inconsistent-declaration-parameter-name,readability-non-const-parameter) */
