/* Outputs that are inputs: which paths lead to one file. */
#include "src/base/path_identity.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static void make(const char *path) {
  int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644);
  assert_true(fd >= 0);
  close(fd);
}

/* Are an input at `in` and an output at `out` in conflict? Neither is touched. */
static bool conflict(const char *in, const char *out) {
  vd_error err = {0};
  vd_path_list *list = vd_path_list_create();
  vd_path_list_add(list, VD_PATH_INPUT, "the input", in);
  vd_path_list_add(list, VD_PATH_OUTPUT, "the output", out);
  int status = vd_path_list_check(list, &err);
  vd_path_list_destroy(list);
  if (status == VD_OK) return false;
  assert_int_equal(status, VD_USAGE);
  assert_non_null(strstr(err.message, "the input"));
  assert_non_null(strstr(err.message, "the output"));
  return true;
}

static void files_that_exist(void **state) {
  (void)state;
  make("a");
  make("b");
  assert_int_equal(mkdir("d", 0777), 0);
  assert_int_equal(mkdir("e", 0777), 0);
  make("d/c");
  assert_int_equal(symlink("a", "link"), 0);
  assert_int_equal(symlink("../a", "d/up"), 0);
  assert_int_equal(symlink("d", "folder"), 0);
  assert_int_equal(link("a", "hard"), 0);
  char cwd[1024], full[2048];
  assert_non_null(getcwd(cwd, sizeof cwd));
  snprintf(full, sizeof full, "%s/a", cwd);
  const char *same[] = {"a", "./a", "link", "hard", "d/up", "d/../a", "folder/../a", ".//a", full};
  for (size_t i = 0; i < sizeof same / sizeof *same; i++) assert_true(conflict("a", same[i]));
  const char *other[] = {"b", "d/c", "d/a", "A", "aa"};
  for (size_t i = 0; i < sizeof other / sizeof *other; i++) assert_false(conflict("a", other[i]));
  assert_true(conflict("d/c", "folder/c"));
}

static void files_that_do_not_exist_yet(void **state) {
  (void)state;
  make("a");
  assert_int_equal(mkdir("d", 0777), 0);
  assert_int_equal(symlink("d", "folder"), 0);
  assert_int_equal(symlink("d/later", "dangling"), 0);
  assert_true(conflict("d/later", "folder/later"));
  assert_true(conflict("dangling", "d/later"));
  assert_true(conflict("new/x/y", "./new//x/./y"));
  assert_false(conflict("d/later", "d/other"));
  assert_false(conflict("new/x", "new/y"));
  assert_false(conflict("d/later", "later"));
}

/* Such a folder is made before the file in it is written; then the path leads back. */
static void parents_of_folders_that_do_not_exist_yet(void **state) {
  (void)state;
  make("a");
  assert_int_equal(mkdir("d", 0777), 0);
  make("d/c");
  assert_int_equal(mkdir("deep", 0777), 0);
  assert_int_equal(mkdir("deep/inside", 0777), 0);
  assert_int_equal(symlink("deep/inside", "into"), 0);
  make("deep/a");
  const char *same[] = {"new/../a", "./new/.././a", "new/x/../../a", "d/new/../../a", "new/..//a", "new/../d/../a"};
  for (size_t i = 0; i < sizeof same / sizeof *same; i++) assert_true(conflict("a", same[i]));
  assert_true(conflict("d/c", "new/../d/c"));
  assert_true(conflict("later", "new/../later"));
  /* Behind a link that is there, ".." is the parent of where the link leads. */
  assert_true(conflict("deep/a", "into/../a"));
  assert_false(conflict("a", "into/../a"));
}

static void patterns(void **state) {
  (void)state;
  vd_error err = {0};
  make("x-train-0003.h5");
  make("s");
  assert_int_equal(link("s", "x-valid-0000.h5"), 0);
  const struct {
    const char *input;
    bool hit;
  } cases[] = {{"x-train-0003.h5", true},        {"x-train-0004.h5", true},
               {"./x-train-99.h5", true},        {"s", true}, /* a file that is there, by another name */
               {"new/../x-train-0001.h5", true}, {"x-train-a.h5", false},
               {"y-train-0003.h5", false},       {"x.h5", false}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    vd_path_list *list = vd_path_list_create();
    vd_path_list_add(list, VD_PATH_INPUT, "the input", cases[i].input);
    vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a shard", ".", "x", "-train-[0-9]*.h5");
    vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a shard", "new/..", "x", "-valid-[0-9]*.h5");
    memset(&err, 0, sizeof err);
    bool hit = vd_path_list_check(list, &err) == VD_USAGE;
    if (hit != cases[i].hit) print_message("%s: %s\n", cases[i].input, err.message);
    assert_true(hit == cases[i].hit);
    vd_path_list_destroy(list);
  }
}

/* The prefix of a pattern is plain text. */
static void prefixes_are_plain(void **state) {
  (void)state;
  vd_error err = {0};
  for (int i = 0; i < 2; i++) {
    vd_path_list *list = vd_path_list_create();
    vd_path_list_add(list, VD_PATH_INPUT, "the input", i ? "[ab]*-1.h5" : "a-1.h5");
    vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a shard", ".", "[ab]*", "-[0-9].h5");
    assert_int_equal(vd_path_list_check(list, &err), i ? VD_USAGE : VD_OK);
    vd_path_list_destroy(list);
  }
}

static void roles(void **state) {
  (void)state;
  vd_error err = {0};
  make("c-1");
  vd_path_list *list = vd_path_list_create();
  vd_path_list_add(list, VD_PATH_INPUT, "one", "c-1");
  vd_path_list_add(list, VD_PATH_INPUT, "two", "c-1"); /* read twice */
  vd_path_list_add(list, VD_PATH_OUTPUT, "unset", "");
  vd_path_list_add(list, VD_PATH_OUTPUT, "unset too", "");
  assert_int_equal(vd_path_list_check(list, &err), VD_OK);
  vd_path_list_destroy(list);
  list = vd_path_list_create();
  vd_path_list_add(list, VD_PATH_RESUMED, "its checkpoint", "c-1");
  vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a checkpoint", ".", "c-", "*");
  assert_int_equal(vd_path_list_check(list, &err), VD_OK);
  vd_path_list_add(list, VD_PATH_OUTPUT, "the log", "c-1");
  assert_int_equal(vd_path_list_check(list, &err), VD_USAGE);
  vd_path_list_destroy(list);
  vd_path_list_destroy(NULL);
}

static void two_outputs(void **state) {
  (void)state;
  vd_error err = {0};
  vd_path_list *list = vd_path_list_create();
  vd_path_list_add(list, VD_PATH_OUTPUT, "one", "result");
  vd_path_list_add(list, VD_PATH_OUTPUT, "two", "other/../result");
  assert_int_equal(vd_path_list_check(list, &err), VD_USAGE);
  vd_path_list_destroy(list);
}

/* Each test in a folder of its own. */
static int enter(void **state) {
  static const char template[] = "viaduct-paths-XXXXXX";
  char *name = malloc(sizeof template);
  memcpy(name, template, sizeof template);
  *state = name;
  return mkdtemp(name) && chdir(name) == 0 ? 0 : -1;
}

static int leave(void **state) {
  char command[64];
  snprintf(command, sizeof command, "rm -rf -- '%s'", (char *)*state);
  free(*state);
  return chdir("..") == 0 && system(command) == 0 ? 0 : -1;
}

int main(void) {
  const char *tmp = getenv("TMPDIR");
  if (chdir(tmp ? tmp : "/tmp") != 0) return 1;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(files_that_exist, enter, leave),
      cmocka_unit_test_setup_teardown(files_that_do_not_exist_yet, enter, leave),
      cmocka_unit_test_setup_teardown(parents_of_folders_that_do_not_exist_yet, enter, leave),
      cmocka_unit_test_setup_teardown(patterns, enter, leave),
      cmocka_unit_test_setup_teardown(prefixes_are_plain, enter, leave),
      cmocka_unit_test_setup_teardown(roles, enter, leave),
      cmocka_unit_test_setup_teardown(two_outputs, enter, leave),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
