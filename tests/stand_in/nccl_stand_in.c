/* A libnccl.so.2 of one rank, whose calls take some polls, as those of a communicator that does not block do. */
#include "cuda/backend/nccl_library.h"
#include "tests/stand_in/stand_in.h"

#include <stdlib.h>
#include <string.h>

#pragma GCC visibility push(default)
/* The headers have other names for parameters, and parameters that could be const. */
/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name,readability-non-const-parameter) */

struct ncclComm {
  int polls;            /* until the last call is done; negative: it has failed */
  ncclWindow_t *window; /* where a registration in progress puts its window */
  ncclWindow_t open[2]; /* windows, or NULL */
};

/* As any library that dlopen loads, this one has its state in itself. */
static stand_in *state(void) {
  static stand_in one;
  return &one;
}
stand_in *stand_in_state(void);
stand_in *stand_in_state(void) {
  return state();
}

static void note(char mark) {
  size_t n = strlen(state()->calls);
  if (n + 1 < sizeof state()->calls) state()->calls[n] = mark;
}
static void close_window(struct ncclComm *c, int i) {
  if (state()->symmetric)
    state()->free(c->open[i]);
  else
    free(c->open[i]);
  c->open[i] = NULL;
}

/* A call while another one is in progress is the caller's fault. */
static ncclResult_t idle(const struct ncclComm *c, char mark) {
  if (c->polls != 0) abort();
  note(mark);
  return ncclSuccess;
}

ncclResult_t ncclGetVersion(int *version) {
  *version = state()->version;
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 3, sizeof *id);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int n_rank, ncclUniqueId id, int rank, ncclConfig_t *config) {
  (void)id;
  if (config->blocking != 0 || n_rank != 1 || rank != 0) abort();
  *c = calloc(1, sizeof **c);
  (*c)->polls = 3;
  return ncclInProgress;
}
ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t stream) {
  (void)from, (void)to, (void)n, (void)type, (void)op, (void)stream;
  return idle(c, 'A');
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t c,
                               cudaStream_t stream) {
  (void)from, (void)to, (void)n, (void)type, (void)op, (void)stream;
  return idle(c, 'R');
}
ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t stream) {
  (void)from, (void)to, (void)n, (void)type, (void)stream;
  return idle(c, 'G');
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *now) {
  if (c->polls > 0 && --c->polls == 0 && c->window) {
    ncclWindow_t *free_one = c->open[0] ? &c->open[1] : &c->open[0];
    *free_one = state()->symmetric ? state()->alloc(8) : malloc(8);
    *c->window = *free_one;
    c->window = NULL;
  }
  *now = c->polls < 0 ? ncclSystemError : c->polls > 0 ? ncclInProgress : ncclSuccess;
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t c) {
  idle(c, 'f');
  c->polls = 2;
  return ncclInProgress;
}
ncclResult_t ncclCommDestroy(ncclComm_t c) {
  idle(c, 'd');
  free(c);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t c) {
  note('x');
  for (int i = 0; i < 2; i++) close_window(c, i);
  free(c);
  return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t r) {
  return r == ncclSystemError ? "system error" : "another error";
}
const char *ncclGetLastError(ncclComm_t c) {
  (void)c;
  return "the last error";
}

/* As in NCCL 2.28, success is reported before the registration is done. */
ncclResult_t ncclCommWindowRegister(ncclComm_t c, void *p, size_t bytes, ncclWindow_t *window, int flags) {
  idle(c, 'w');
  if (bytes == 0 || flags != NCCL_WIN_COLL_SYMMETRIC) abort();
  state()->registered[0] = state()->registered[1];
  state()->registered[1] = p;
  c->polls = state()->failing_register-- == 0 ? -1 : 3;
  c->window = window;
  return ncclSuccess;
}
ncclResult_t ncclCommWindowDeregister(ncclComm_t c, ncclWindow_t window) {
  idle(c, 'u');
  close_window(c, window == c->open[0] ? 0 : 1);
  return ncclSuccess;
}
ncclResult_t ncclMemAlloc(void **p, size_t bytes) {
  if (state()->failing_alloc-- == 0) return ncclSystemError;
  state()->n_alloc++;
  *p = state()->alloc(bytes);
  return ncclSuccess;
}
ncclResult_t ncclMemFree(void *p) {
  state()->n_free++;
  state()->free(p);
  return ncclSuccess;
}
/* NOLINTEND(readability-inconsistent-declaration-parameter-name,readability-non-const-parameter) */
#pragma GCC visibility pop
