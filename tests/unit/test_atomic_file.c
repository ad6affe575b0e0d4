/* Files that appear whole or not at all, and folders. */
#include "io/atomic_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

/* Files of the current folder, temporaries among them. */
static int n_files(void) {
  int n = 0;
  DIR *dir = opendir(".");
  for (const struct dirent *e; (e = readdir(dir)) != NULL;)
    n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
  closedir(dir);
  return n;
}

static void assert_holds(const char *path, const char *text) {
  char found[256];
  FILE *f = fopen(path, "r");
  assert_non_null(f);
  size_t n = fread(found, 1, sizeof found - 1, f);
  fclose(f);
  found[n] = '\0';
  assert_string_equal(found, text);
}

static void writes_and_replaces(void **state) {
  (void)state;
  vd_error err = {0};
  assert_int_equal(vd_atomic_write("a", "first", 5, &err), VD_OK);
  assert_holds("a", "first");
  assert_int_equal(vd_atomic_write("./a", "2", 1, &err), VD_OK);
  assert_holds("a", "2");
  assert_int_equal(n_files(), 1);
}

static void shows_nothing_before_the_commit(void **state) {
  (void)state;
  vd_error err = {0};
  vd_atomic_file f;
  int fd;
  assert_int_equal(vd_atomic_write("a", "old", 3, &err), VD_OK);
  assert_int_equal(vd_atomic_begin(&f, "a", &err), VD_OK);
  assert_int_equal(vd_atomic_create(&f, O_APPEND, &fd, &err), VD_OK);
  assert_int_equal(vd_write_all(fd, "a", "new", 3, &err), VD_OK);
  assert_holds("a", "old");
  assert_true(vd_is_temporary(f.temporary, "a"));
  assert_int_equal(vd_atomic_commit(&f, &err), VD_OK);
  assert_holds("a", "new");
  assert_int_equal(vd_write_all(fd, "a", "er", 2, &err), VD_OK); /* the descriptor is that of the file in its place */
  close(fd);
  assert_holds("a", "newer");
  vd_atomic_abandon(&f); /* after a commit: nothing */
  assert_holds("a", "newer");
}

static void abandons(void **state) {
  (void)state;
  vd_error err = {0};
  vd_atomic_file f;
  int fd;
  assert_int_equal(vd_atomic_write("a", "old", 3, &err), VD_OK);
  assert_int_equal(vd_atomic_begin(&f, "a", &err), VD_OK);
  assert_int_equal(vd_atomic_create(&f, 0, &fd, &err), VD_OK);
  close(fd);
  vd_atomic_abandon(&f);
  assert_holds("a", "old");
  assert_int_equal(n_files(), 1);
}

static void leaves_the_old_file_on_error(void **state) {
  (void)state;
  vd_error err = {0};
  vd_atomic_file f;
  assert_int_equal(vd_atomic_write("a", "old", 3, &err), VD_OK);
  assert_int_equal(vd_atomic_begin(&f, "a", &err), VD_OK);
  assert_int_equal(vd_atomic_commit(&f, &err), VD_FAILED); /* there is no temporary */
  assert_non_null(strstr(err.message, "cannot sync"));
  assert_holds("a", "old");
}

static void refuses(const char *path, const char *message) {
  vd_error err = {0};
  vd_atomic_file f;
  assert_int_equal(vd_atomic_begin(&f, path, &err), VD_FAILED);
  if (!strstr(err.message, message)) fail_msg("no '%s' in: %s", message, err.message);
  assert_string_equal(f.temporary, "");
  vd_atomic_abandon(&f);
}

static void refuses_what_is_no_file(void **state) {
  (void)state;
  char longest[2048];
  memset(longest, 'x', sizeof longest - 1);
  longest[sizeof longest - 1] = '\0';
  assert_int_equal(mkfifo("pipe", 0600), 0);
  assert_int_equal(mkdir("folder", 0700), 0);
  refuses("/dev/null", "not a regular file");
  refuses("pipe", "not a regular file");
  refuses("folder", "not a regular file");
  refuses("nowhere/a", "No such file");
  refuses(longest, "too long");
}

static void knows_temporaries(void **state) {
  (void)state;
  assert_true(vd_is_temporary(".a.tmp-1", NULL));
  assert_true(vd_is_temporary(".a.tmp-1.tmp-23", "a.tmp-1"));
  assert_false(vd_is_temporary(".a.tmp-1.tmp-23", "a"));
  assert_false(vd_is_temporary(".a.tmp-", NULL));
  assert_false(vd_is_temporary(".a.tmp-1x", NULL));
  assert_false(vd_is_temporary("a.tmp-1", NULL));
}

static void makes_folders(void **state) {
  (void)state;
  vd_error err = {0};
  struct stat info;
  char here[1024], path[1100];
  assert_int_equal(vd_make_folder("a/b//c/", &err), VD_OK);
  assert_int_equal(vd_make_folder("a/b/c", &err), VD_OK);
  assert_int_equal(stat("a/b/c", &info), 0);
  assert_true(S_ISDIR(info.st_mode));
  assert_non_null(getcwd(here, sizeof here));
  snprintf(path, sizeof path, "%s/d/e", here);
  assert_int_equal(vd_make_folder(path, &err), VD_OK);
  assert_int_equal(stat("d/e", &info), 0);
  assert_int_equal(vd_make_folder(".", &err), VD_OK);
  assert_int_equal(vd_make_folder("/", &err), VD_OK);
  assert_int_equal(vd_atomic_write("file", "", 0, &err), VD_OK);
  assert_int_equal(vd_make_folder("file", &err), VD_FAILED);
  assert_string_equal(err.message, "file is not a folder");
  err = (vd_error){0};
  assert_int_equal(vd_make_folder("file/below", &err), VD_FAILED);
  assert_non_null(strstr(err.message, "cannot make the folder file/below"));
}

static void splits_paths(void **state) {
  (void)state;
  char folder[32];
  assert_string_equal(vd_split_path("a/b/c.h5", folder, sizeof folder), "c.h5");
  assert_string_equal(folder, "a/b");
  assert_string_equal(vd_split_path("c.h5", folder, sizeof folder), "c.h5");
  assert_string_equal(folder, ".");
  assert_string_equal(vd_split_path("/c.h5", folder, sizeof folder), "c.h5");
  assert_string_equal(folder, "/");
}

static char before[1024];

/* Each test has an empty folder of its own. */
static int enter(void **state) {
  (void)state;
  char folder[] = "/tmp/viaduct-atomic-XXXXXX";
  return getcwd(before, sizeof before) && mkdtemp(folder) && chdir(folder) == 0 ? 0 : -1;
}

static int leave(void **state) {
  (void)state;
  char here[1024], command[1100];
  if (!getcwd(here, sizeof here) || chdir(before) != 0) return -1;
  snprintf(command, sizeof command, "rm -rf '%s'", here);
  return system(command);
}

#define IN_A_FOLDER(test) cmocka_unit_test_setup_teardown(test, enter, leave)

int main(void) {
  const struct CMUnitTest tests[] = {
      IN_A_FOLDER(writes_and_replaces),
      IN_A_FOLDER(shows_nothing_before_the_commit),
      IN_A_FOLDER(abandons),
      IN_A_FOLDER(leaves_the_old_file_on_error),
      IN_A_FOLDER(refuses_what_is_no_file),
      IN_A_FOLDER(knows_temporaries),
      IN_A_FOLDER(makes_folders),
      IN_A_FOLDER(splits_paths),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
