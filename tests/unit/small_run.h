/* Runs of a tiny model on the CPU, in a folder of their own, for tests of the training loop. */
#ifndef VD_SMALL_RUN_H
#define VD_SMALL_RUN_H

#include "src/train/train.h"

struct small_run {
  vd_context ctx;
  char folder[256], corpus[300], run[300]; /* run: of the last one that was opened */
  vd_settings settings;
  vd_train t;
};

/* Not collective. For cmocka: *state becomes a small_run with a corpus. */
int small_run_setup(void **state);
/* Not collective. Removes the folder. */
int small_run_teardown(void **state);
/* Not collective. Plans and opens a run; `run`: values of the deck's group &run, `groups`: other groups but &data and
 * &device. */
void small_run_open(struct small_run *f, const char *name, const char *run, const char *groups);
/* Not collective. Makes the run's backend one that is reached by put and get alone, as a GPU is, or the CPU again; with
 * a pipeline of that lag. */
void small_run_set_remote(struct small_run *f, bool remote);
/* Not collective. log.jsonl of the run as text. */
void small_run_log(const struct small_run *f, char *text, size_t size);

#endif
