/* See nccl_library.h. */
#include "cuda/backend/nccl_library.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { VD_OLDEST_NCCL = 21400 };      /* the first with non-blocking communicators */
enum { VD_OLDEST_SYMMETRIC = 22800 }; /* older ones were not tried */

int vd_cuda_nccl_load(vd_nccl_calls *c, vd_error *err) {
  const char *const names[] = {"ncclGetVersion",         "ncclGetUniqueId",
                               "ncclCommInitRankConfig", "ncclAllReduce",
                               "ncclReduceScatter",      "ncclAllGather",
                               "ncclCommGetAsyncError",  "ncclCommFinalize",
                               "ncclCommDestroy",        "ncclCommAbort",
                               "ncclGetErrorString",     "ncclGetLastError",
                               "ncclCommWindowRegister", "ncclCommWindowDeregister",
                               "ncclMemAlloc",           "ncclMemFree"};
  enum { N = sizeof names / sizeof *names, N_SYMMETRIC = 4 };
  void *found[N];
  int version = 0;
  _Static_assert(sizeof found == sizeof *c, "a name for each function");
  setenv("NCCL_NVLS_ENABLE", "0", 0); /* multicast hangs on nodes with a broken fabric manager */
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!library) return vd_fail(err, VD_FAILED, "NCCL cannot be loaded: %s", dlerror());
  for (int i = 0; i < N; i++) {
    found[i] = dlsym(library, names[i]);
    if (!found[i] && i < N - N_SYMMETRIC)
      return vd_fail(err, VD_FAILED, "this libnccl.so.2 is too old: it has no %s", names[i]);
  }
  memcpy(c, found, sizeof *c);
  bool whole = c->window_register && c->window_deregister && c->mem_alloc && c->mem_free;
  if (!whole || c->version(&version) != ncclSuccess || version < VD_OLDEST_SYMMETRIC) {
    c->window_register = NULL;
    c->window_deregister = NULL;
    c->mem_alloc = NULL;
    c->mem_free = NULL;
  }
  return VD_OK;
}

int vd_cuda_nccl_version(int *version, vd_error *err) {
  vd_nccl_calls c;
  if (vd_cuda_nccl_load(&c, err)) return err->status;
  if (c.version(version) != ncclSuccess) return vd_fail(err, VD_FAILED, "ncclGetVersion failed");
  if (*version < VD_OLDEST_NCCL)
    return vd_fail(err, VD_FAILED, "NCCL %d.%d.%d is too old: 2.14 or newer is needed", *version / 10000,
                   *version / 100 % 100, *version % 100);
  return VD_OK;
}

int vd_cuda_nccl_unique_id(vd_nccl_id *id, vd_error *err) {
  vd_nccl_calls c;
  if (vd_cuda_nccl_load(&c, err)) return err->status;
  ncclUniqueId mine;
  ncclResult_t r = c.unique_id(&mine);
  if (r != ncclSuccess) return vd_fail(err, VD_FAILED, "NCCL: %s: %s", c.error_string(r), c.last_error(NULL));
  memcpy(id->bytes, mine.internal, sizeof id->bytes);
  return VD_OK;
}
