/* Symmetric memory and the life of a communicator, over stand-ins for CUDA and NCCL: what NCCL is asked, in which
 * order, and what is left. */
#include "cuda/backend/nccl.h"
#include "cuda/backend/symmetric_memory.h"
#include "tests/stand_in/stand_in.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { N = 96 };

static void free_device(void *p) {
  cudaFree(p);
}

static stand_in *library(void) {
  void *handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  assert_non_null(handle);
  stand_in *(*found)(void) = NULL;
  *(void **)&found = dlsym(handle, "stand_in_state");
  assert_non_null(found);
  stand_in *s = found();
  *s = (stand_in){.version = 22803,
                  .symmetric = true,
                  .failing_alloc = -1,
                  .failing_register = -1,
                  .alloc = stand_in_device_memory,
                  .free = free_device};
  return s;
}

struct rank {
  vd_cuda_backend backend;
  vd_ops ops;
  vd_nccl *nccl;
  void *gradients, *params, *copy; /* copy NULL: products read the parameters themselves */
  int live;                        /* objects before this rank's */
};

static void take(struct rank *r, void **p, size_t bytes) {
  vd_error err = {0};
  if (r->backend.symmetric)
    assert_int_equal(vd_cuda_symmetric_alloc(&r->backend, p, bytes, &err), VD_OK);
  else
    cudaMalloc(p, bytes);
}

/* A rank with its arenas and communicator. */
static void open_rank(struct rank *r, bool half) {
  vd_error err = {0};
  vd_nccl_id id;
  const vd_nccl_plugin *nccl = vd_cuda_nccl();
  *r = (struct rank){.backend = {.type = half ? VD_BF16 : VD_FP32, .act_size = half ? 2 : 4, .pooled = true},
                     .live = stand_in_live()};
  r->ops.self = &r->backend;
  cudaStreamCreateWithPriority(&r->backend.stream, 0, 0);
  for (int twice = 0; twice < 2; twice++) assert_int_equal(nccl->use_symmetric_memory(&r->ops, &err), VD_OK);
  take(r, &r->params, N * sizeof(float));
  take(r, &r->gradients, N * sizeof(float));
  if (half) {
    take(r, &r->copy, N * 2);
    r->backend.arena[r->backend.n_arena++] = (vd_arena){.params = r->params, .n = N, .copy = r->copy};
  }
  assert_int_equal(nccl->unique_id(&id, &err), VD_OK);
  assert_int_equal(nccl->init(&r->nccl, &r->ops, &id, 0, 1, &err), VD_OK);
}

/* An update as a sharded optimizer exchanges it. */
static void exchange(const struct rank *r) {
  vd_error err = {0};
  const vd_nccl_plugin *nccl = vd_cuda_nccl();
  nccl->begin_update(r->nccl);
  nccl->begin_backward(r->nccl);
  assert_int_equal(nccl->reduce_scatter(r->nccl, r->gradients, N / 2, N / 2, &err), VD_OK);
  assert_int_equal(nccl->all_reduce(r->nccl, r->gradients, 0, N / 2, &err), VD_OK);
  nccl->wait_all_reduces(r->nccl);
  assert_int_equal(nccl->all_gather(r->nccl, 0, r->params, N / 2, N / 2, false, &err), VD_OK);
  nccl->wait_all_gather(r->nccl, 0);
  assert_int_equal(nccl->count(r->nccl, 0), 2);
}

static void give(struct rank *r, void *p) {
  if (!vd_cuda_symmetric_free(&r->backend, p)) cudaFree(p);
}

/* Ends the communicator, then the memory, as a model's and its backend's ends do. Nothing is left. */
static void close_rank(struct rank *r) {
  const vd_nccl_plugin *nccl = vd_cuda_nccl();
  nccl->finalize(r->nccl);
  nccl->abort(r->nccl); /* nothing is left to abort */
  nccl->destroy(r->nccl);
  give(r, r->copy);
  give(r, r->params);
  assert_false(vd_cuda_is_symmetric(&r->backend, r->params));
  if (!r->backend.symmetric) give(r, r->gradients);
  vd_cuda_symmetric_end(&r->backend); /* frees what is left: the gradients */
  cudaStreamDestroy(r->backend.stream);
  assert_int_equal(r->backend.error.status, VD_OK);
  assert_int_equal(stand_in_live(), r->live);
}

/* The program registers the gradients and what products read. It cannot abort; windows end before the communicator. */
static void registers_arenas(void **state) {
  (void)state;
  for (int half = 0; half < 2; half++) {
    stand_in *s = library();
    struct rank r;
    vd_error err = {0};
    const vd_nccl_plugin *nccl = vd_cuda_nccl();
    open_rank(&r, half);
    assert_int_equal(nccl->register_arenas(r.nccl, r.gradients, r.params, N, &err), VD_OK);
    assert_true(nccl->is_registered(r.nccl));
    assert_ptr_equal(s->registered[0], r.gradients);
    assert_ptr_equal(s->registered[1], half ? r.copy : r.params);
    exchange(&r);
    nccl->abort(r.nccl);
    exchange(&r);
    close_rank(&r);
    assert_string_equal(s->calls, "AwwRAGRAGuufd");
    assert_true(s->n_alloc == 2 + half && s->n_free == s->n_alloc);
  }
}

/* Where GPUs have no symmetric memory, and where NCCL is too old to know any. */
static void works_without(void **state) {
  (void)state;
  for (int old = 0; old < 2; old++) {
    stand_in *s = library();
    struct rank r;
    vd_error err = {0};
    const vd_nccl_plugin *nccl = vd_cuda_nccl();
    s->version = old ? 22705 : 22803;
    s->symmetric = false;
    open_rank(&r, true);
    assert_int_equal(r.backend.symmetric == NULL, old);
    assert_int_equal(nccl->register_arenas(r.nccl, r.gradients, r.params, N, &err), VD_OK);
    assert_false(nccl->is_registered(r.nccl));
    exchange(&r);
    close_rank(&r);
    assert_string_equal(s->calls, old ? "ARAGfd" : "AwuwuRAGfd");
  }
}

/* Other ranks may wait for the registration: the communicator is aborted. */
static void aborts_where_registration_fails(void **state) {
  (void)state;
  for (int at = 0; at < 2; at++) {
    stand_in *s = library();
    struct rank r;
    vd_error err = {0};
    const vd_nccl_plugin *nccl = vd_cuda_nccl();
    s->failing_register = at;
    open_rank(&r, true);
    assert_int_equal(nccl->register_arenas(r.nccl, r.gradients, r.params, N, &err), VD_FAILED);
    assert_non_null(strstr(err.message, "symmetric memory: system error (the last error)"));
    assert_false(nccl->is_registered(r.nccl));
    nccl->async_error(r.nccl, &err);
    close_rank(&r);
    assert_string_equal(s->calls, at ? "Awwx" : "Awx");
  }
}

/* Where no operation has used a window, a communicator is aborted, and what follows is for none. */
static void aborts_without_windows(void **state) {
  (void)state;
  for (int registered = 0; registered < 2; registered++) {
    stand_in *s = library();
    struct rank r;
    vd_error err = {0};
    open_rank(&r, true);
    if (registered)
      vd_cuda_nccl()->register_arenas(r.nccl, r.gradients, r.params, N, &err);
    else
      exchange(&r);
    vd_cuda_nccl()->abort(r.nccl);
    close_rank(&r);
    assert_string_equal(s->calls, registered ? "Awwx" : "ARAGx");
  }
}

/* The pool's free memory goes back before an allocation fails. The message has NCCL's reason. */
static void tells_why_there_is_no_memory(void **state) {
  (void)state;
  stand_in *s = library();
  vd_error err = {0};
  vd_cuda_backend c = {.device = 3, .pooled = true};
  vd_ops o = {.self = &c};
  void *p = NULL;
  unsetenv("NCCL_SYM_CTAS");
  assert_int_equal(vd_cuda_use_symmetric_memory(&o, &err), VD_OK);
  assert_string_equal(getenv("NCCL_SYM_CTAS"), "32");
  s->failing_alloc = 0;
  assert_int_equal(vd_cuda_symmetric_alloc(&c, &p, 1 << 20, &err), VD_OK);
  c.pooled = false;
  s->failing_alloc = 0;
  assert_int_equal(vd_cuda_symmetric_alloc(&c, &p, 3 << 20, &err), VD_FAILED);
  assert_string_equal(err.message, "GPU 3: NCCL allocates no 3.0 MiB: system error (the last error)");
  vd_cuda_symmetric_end(&c);
  setenv("NCCL_SYM_CTAS", "7", 1);
  assert_int_equal(vd_cuda_use_symmetric_memory(&o, &(vd_error){0}), VD_OK);
  assert_string_equal(getenv("NCCL_SYM_CTAS"), "7");
  vd_cuda_symmetric_end(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(registers_arenas), cmocka_unit_test(works_without),
                                     cmocka_unit_test(aborts_where_registration_fails),
                                     cmocka_unit_test(aborts_without_windows),
                                     cmocka_unit_test(tells_why_there_is_no_memory)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
