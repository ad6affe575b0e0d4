/* The log: lines come back as JSON, a resumed run tells nothing twice and throws nothing away that it did not write,
 * a killed or hindered writer leaves whole lines. */
#include "src/train/log.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

typedef struct fixture {
  char folder[512], path[600];
} fixture;

static int setup(void **state) {
  fixture *f = calloc(1, sizeof *f);
  const char *base = getenv("TMPDIR");
  snprintf(f->folder, sizeof f->folder, "%s/viaduct-log.XXXXXX", base ? base : "/tmp");
  if (!mkdtemp(f->folder)) return -1;
  snprintf(f->path, sizeof f->path, "%s/log.jsonl", f->folder);
  *state = f;
  return 0;
}

static int teardown(void **state) {
  fixture *f = *state;
  unlink(f->path);
  int left = rmdir(f->folder); /* fails where a temporary is left */
  free(f);
  return left;
}

static void put_text(const char *path, const char *text) {
  FILE *file = fopen(path, "w");
  assert_non_null(file);
  assert_true(fputs(text, file) >= 0);
  assert_int_equal(fclose(file), 0);
}

/* The whole file, which is short; the caller frees. */
static char *get_text(const char *path) {
  enum { CAPACITY = 1 << 20 };
  FILE *file = fopen(path, "r");
  assert_non_null(file);
  char *text = calloc(1, CAPACITY);
  assert_non_null(text);
  assert_true(fread(text, 1, CAPACITY, file) < CAPACITY);
  fclose(file);
  return text;
}

static void append_to(vd_log *log, int64_t update, double bpc) {
  vd_error err = {0};
  vd_log_row row = {.update = update,
                    .epoch = 1,
                    .bpc = bpc,
                    .learning_rate = 0.07,
                    .grad_norm = 1.0,
                    .tokens_per_second = 1e4,
                    .mean_span = 20.0,
                    .max_span = 30.0};
  assert_int_equal(vd_log_update(log, &row, &err), VD_OK);
}

/* Asserts that the file's lines are JSON objects of the updates 1 .. n in order. */
static void expect_updates(const char *path, int64_t n) {
  char *text = get_text(path), *rest = NULL;
  int64_t update = 0;
  assert_true(n == 0 || text[strlen(text) - 1] == '\n');
  for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
    json_t *row = json_loads(line, 0, NULL);
    assert_non_null(row);
    assert_int_equal(json_integer_value(json_object_get(row, "num_updates")), ++update);
    json_decref(row);
  }
  assert_int_equal(update, n);
  free(text);
}

static void test_fields(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_log *log;
  assert_int_equal(vd_log_open(&log, f->folder, 0, 100, NULL, false, &err), VD_OK);
  vd_log_row row = {.update = 1,
                    .epoch = 3,
                    .bpc = 2.5,
                    .span_penalty = log1p(1.0),
                    .learning_rate = 0.07,
                    .grad_norm = NAN,
                    .tokens_per_second = 1e4,
                    .mean_span = 20.0,
                    .max_span = 30.0,
                    .data_wait = 0.25};
  assert_int_equal(vd_log_update(log, &row, &err), VD_OK);
  assert_int_equal(vd_log_valid(log, 1, 3, 2.25, true, &err), VD_OK);
  assert_true(vd_log_wall(log) >= 0.0);
  vd_log_close(&log);
  assert_null(log);
  char *text = get_text(f->path), *second = strchr(text, '\n') + 1;
  second[-1] = '\0';
  json_t *a = json_loads(text, 0, NULL), *b = json_loads(second, 0, NULL);
  assert_non_null(a);
  assert_true(json_real_value(json_object_get(a, "data_wait")) == 0.25);
  assert_non_null(b);
  const char *names[] = {"bpc", "loss", "lr", "wps", "avg_span", "max_span"};
  const double want[] = {2.5, 3.5, 0.07, 1e4, 20.0, 30.0};
  for (int i = 0; i < 6; i++)
    assert_true(fabs(json_number_value(json_object_get(a, names[i])) - want[i]) <= 1e-8 * want[i]);
  assert_int_equal(json_integer_value(json_object_get(a, "num_updates")), 1);
  assert_int_equal(json_integer_value(json_object_get(a, "epoch")), 3);
  assert_true(json_is_null(json_object_get(a, "gnorm")));
  assert_true(json_is_number(json_object_get(a, "wall")));
  assert_true(json_number_value(json_object_get(b, "valid_bpc")) == 2.25);
  json_decref(a);
  json_decref(b);
  free(text);
}

/* Opens after update 4 a log of `text`, and expects `kept`; what the terminal got goes into said [1024]. */
static void resume(const fixture *f, const char *text, const char *kept, double wall, char *said) {
  vd_error err = {0};
  vd_log *log;
  FILE *terminal = tmpfile();
  assert_non_null(terminal);
  put_text(f->path, text);
  assert_int_equal(vd_log_open(&log, f->folder, 4, 100, terminal, false, &err), VD_OK);
  assert_true(vd_log_wall(log) >= wall && vd_log_wall(log) < wall + 60.0);
  vd_log_close(&log);
  char *now = get_text(f->path);
  assert_string_equal(now, kept);
  free(now);
  rewind(terminal);
  said[fread(said, 1, 1023, terminal)] = '\0';
  fclose(terminal);
}

#define ROW_2 "{\"num_updates\":2,\"wall\":100.5}\n"
#define ROW_4 "{\"num_updates\":4,\"wall\":200.5}\n"
#define ROW_6 "{\"num_updates\":6,\"wall\":300.5}\n"

static void test_resume_drops_later_lines(void **state) {
  char said[1024];
  resume(*state, ROW_2 ROW_4 ROW_6, ROW_2 ROW_4, 200.5, said);
  assert_string_equal(said, "");
  resume(*state, ROW_2 ROW_4 ROW_6 "{\"num_upda", ROW_2 ROW_4, 200.5, said);
  assert_string_equal(said, "");
  resume(*state, "", "", 0.0, said);
}

static void test_resume_keeps_what_is_not_its_own(void **state) {
  char said[1024];
  resume(*state, ROW_2 "# a note of the user's\n" ROW_4 "{\"x\":1}\n" ROW_6,
         ROW_2 "# a note of the user's\n" ROW_4 "{\"x\":1}\n", 200.5, said);
  assert_non_null(strstr(said, "log.jsonl:2 cannot be read; it is kept"));
  assert_non_null(strstr(said, "log.jsonl:4 cannot be read; it is kept"));
  /* Whole but for its newline. */
  resume(*state, ROW_2 "{\"num_updates\":4,\"wall\":7.5}", ROW_2 "{\"num_updates\":4,\"wall\":7.5}\n", 7.5, said);
  assert_string_equal(said, "");
}

static void test_killed_writer(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_log *log;
  int64_t done = 0;
  for (int round = 0; round < 5; round++) {
    int to_parent[2];
    assert_int_equal(pipe(to_parent), 0);
    pid_t child = fork();
    if (child == 0) {
      if (vd_log_open(&log, f->folder, done, 1000000, NULL, false, &err)) _exit(1);
      for (int64_t u = done + 1;; u++) {
        append_to(log, u, 2.0);
        if (write(to_parent[1], &u, sizeof u) != sizeof u) _exit(1);
      }
    }
    int64_t logged;
    for (int i = 0; i < 7 + 3 * round; i++) assert_int_equal(read(to_parent[0], &logged, sizeof logged), sizeof logged);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    close(to_parent[0]);
    close(to_parent[1]);
    done = logged - 2; /* the last checkpoint was before the last rows */
    assert_int_equal(vd_log_open(&log, f->folder, done, 100, NULL, false, &err), VD_OK);
    vd_log_close(&log);
    expect_updates(f->path, done);
  }
}

static void test_full_disk(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_log *log;
  struct rlimit old, small;
  assert_int_equal(vd_log_open(&log, f->folder, 0, 100, NULL, false, &err), VD_OK);
  append_to(log, 1, 2.0);
  append_to(log, 2, 2.0);
  struct stat before, after;
  assert_int_equal(stat(f->path, &before), 0);
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
  small = old;
  small.rlim_cur = (rlim_t)before.st_size + 10; /* room for a part of a line */
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
  vd_log_row row = {.update = 3, .epoch = 1, .bpc = 2.0};
  int status = vd_log_update(log, &row, &err);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
  assert_int_equal(status, VD_FAILED);
  assert_non_null(strstr(err.message, f->path));
  assert_int_equal(stat(f->path, &after), 0);
  assert_int_equal(after.st_size, before.st_size);
  append_to(log, 3, 2.0); /* and there is room again */
  vd_log_close(&log);
  expect_updates(f->path, 3);
}

static void test_no_folder(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_log *log;
  char missing[600];
  snprintf(missing, sizeof missing, "%s/none", f->folder);
  assert_int_equal(vd_log_open(&log, missing, 0, 100, NULL, false, &err), VD_FAILED);
  assert_null(log);
  assert_non_null(strstr(err.message, missing));
}

/* The ranks that do not own the log. */
static void test_no_log(void **state) {
  (void)state;
  vd_error err = {0};
  vd_log *none = NULL;
  vd_log_row row = {.update = 1};
  assert_int_equal(vd_log_update(none, &row, &err), VD_OK);
  assert_int_equal(vd_log_valid(none, 1, 1, 2.0, false, &err), VD_OK);
  vd_log_live(none, &row);
  vd_log_message(none, "nothing");
  assert_true(vd_log_wall(none) == 0.0);
  vd_log_close(&none);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_fields, setup, teardown),
      cmocka_unit_test_setup_teardown(test_resume_drops_later_lines, setup, teardown),
      cmocka_unit_test_setup_teardown(test_resume_keeps_what_is_not_its_own, setup, teardown),
      cmocka_unit_test_setup_teardown(test_killed_writer, setup, teardown),
      cmocka_unit_test_setup_teardown(test_full_disk, setup, teardown),
      cmocka_unit_test_setup_teardown(test_no_folder, setup, teardown),
      cmocka_unit_test(test_no_log),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
