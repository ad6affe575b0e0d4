#include "tests/unit/small_run.h"

#include "tests/unit/corpus_maker.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

int small_run_setup(void **state) {
  struct small_run *f = vd_calloc(1, sizeof *f);
  vd_error err = {0};
  const char *tmp = getenv("TMPDIR");
  const int64_t n[3] = {4000, 100, 100};
  snprintf(f->folder, sizeof f->folder, "%s/vd-test-run-XXXXXX", tmp ? tmp : "/tmp");
  f->ctx.comm = MPI_COMM_WORLD;
  f->ctx.size = 1;
  if (!mkdtemp(f->folder) || vd_h5_create(&f->ctx.h5, &err)) return -1;
  snprintf(f->corpus, sizeof f->corpus, "%s/c.h5", f->folder);
  *state = f;
  return maker_write(f->ctx.h5, f->corpus, n, 5000, 0, 17, &err);
}

int small_run_teardown(void **state) {
  struct small_run *f = *state;
  vd_h5_destroy(f->ctx.h5);
  char command[300];
  snprintf(command, sizeof command, "rm -rf %s", f->folder);
  int status = system(command);
  free(f);
  return status;
}

void small_run_open(struct small_run *f, const char *name, const char *run, const char *groups) {
  vd_error err = {0};
  char deck[2000];
  snprintf(deck, sizeof deck,
           "&run directory='%s/%s', resume='never', %s /\n&data path='%s', tokens_per_sample=8, batch_streams=2 /\n"
           "&device backend='cpu', threads=1 /\n%s\n",
           f->folder, name, run, f->corpus, groups);
  snprintf(f->run, sizeof f->run, "%s/%s", f->folder, name);
  vd_settings_read_text(&f->settings, deck, "deck", &err);
  assert_string_equal(err.message, "");
  vd_train_plan(&f->t, &f->ctx, &f->settings, &err);
  vd_train_open(&f->t, &err);
  assert_string_equal(err.message, "");
}

void small_run_set_remote(struct small_run *f, bool remote) {
  f->t.ops->memory_is_remote = remote;
  vd_update_pipeline_destroy(f->t.pipeline);
  f->t.pipeline = vd_update_pipeline_create(f->t.model, f->t.optimizer, f->t.ops);
}

void small_run_log(const struct small_run *f, char *text, size_t size) {
  char path[400];
  snprintf(path, sizeof path, "%s/log.jsonl", f->run);
  FILE *file = fopen(path, "r");
  assert_non_null(file);
  text[fread(text, 1, size - 1, file)] = '\0';
  fclose(file);
}
