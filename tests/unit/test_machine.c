/* What a host has: memory as the kernel says it and as control groups limit it, disk of folders that are not there yet.
 */
#include "src/base/machine.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cmocka.h>

/* A folder that stands for the host's root. */
static int setup(void **state) {
  char *root = calloc(1, 512);
  const char *base = getenv("TMPDIR");
  snprintf(root, 512, "%s/viaduct-machine.XXXXXX", base ? base : "/tmp");
  *state = root;
  return mkdtemp(root) ? 0 : -1;
}

static int teardown(void **state) {
  char command[600];
  snprintf(command, sizeof command, "rm -rf '%s'", (char *)*state);
  int left = system(command);
  free(*state);
  return left;
}

/* Writes a file below the root, with its folders. */
static void put(const char *root, const char *path, const char *text) {
  char at[1024];
  snprintf(at, sizeof at, "%s/%s", root, path);
  for (char *slash = strchr(at + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
    *slash = '\0';
    mkdir(at, 0777);
    *slash = '/';
  }
  FILE *file = fopen(at, "w");
  assert_non_null(file);
  assert_true(fputs(text, file) >= 0);
  assert_int_equal(fclose(file), 0);
}

static void expect(const char *root, double bytes, const char *limit) {
  char what[VD_LIMIT_TEXT];
  assert_true(vd_host_memory(root, what) == bytes);
  assert_string_equal(what, limit);
}

static void test_memory_of_the_host(void **state) {
  const char *root = *state;
  expect(root, HUGE_VAL, "MemAvailable");
  put(root, "proc/meminfo", "MemTotal:       8000 kB\nMemFree:        10 kB\nMemAvailable:   4000 kB\n");
  expect(root, 4000 * 1024.0, "MemAvailable");
}

static void test_groups_of_version_2(void **state) {
  const char *root = *state;
  put(root, "proc/meminfo", "MemAvailable:   4000 kB\n");
  put(root, "proc/self/cgroup", "0::/job/step\n");
  put(root, "sys/fs/cgroup/job/step/memory.max", "max\n");
  put(root, "sys/fs/cgroup/job/step/memory.current", "700000\n");
  expect(root, 4000 * 1024.0, "MemAvailable");
  /* The group above limits; what its files' caches take is free. */
  put(root, "sys/fs/cgroup/job/memory.max", "1000000\n");
  put(root, "sys/fs/cgroup/job/memory.current", "700000\n");
  put(root, "sys/fs/cgroup/job/memory.stat", "anon 400000\ninactive_file 200000\nactive_file 50000\n");
  expect(root, 550000.0, "limit of the control group");
  put(root, "sys/fs/cgroup/job/memory.current", "2000000\n");
  expect(root, 0.0, "limit of the control group");
}

static void test_groups_of_version_1(void **state) {
  const char *root = *state;
  put(root, "proc/meminfo", "MemAvailable:   4000 kB\n");
  put(root, "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n");
  put(root, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n");
  put(root, "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "5\n");
  expect(root, 4000 * 1024.0, "MemAvailable");
  put(root, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "3000000\n");
  put(root, "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "1000000\n");
  put(root, "sys/fs/cgroup/memory/a/b/memory.stat", "inactive_file 1\ntotal_inactive_file 400000\n");
  expect(root, 2400000.0, "limit of the control group");
}

/* In a container /proc/self/cgroup may name the path of the host, of which only the mount's top is seen. */
static void test_groups_of_a_container(void **state) {
  const char *root = *state;
  put(root, "proc/meminfo", "MemAvailable:   4000 kB\n");
  put(root, "proc/self/cgroup", "0::/docker/0123\n");
  put(root, "sys/fs/cgroup/memory.max", "2000000\n");
  put(root, "sys/fs/cgroup/memory.current", "500000\n");
  expect(root, 1500000.0, "limit of the control group");
}

static void test_disk(void **state) {
  const char *root = *state;
  char path[600], folder[600];
  struct statvfs disk;
  snprintf(path, sizeof path, "%s/not/there/yet", root);
  vd_existing_folder(path, folder, sizeof folder);
  assert_string_equal(folder, root);
  assert_int_equal(statvfs(root, &disk), 0);
  double total = (double)disk.f_blocks * (double)disk.f_frsize, has = vd_disk_free(path);
  assert_true(has >= 0 && has <= total);
  vd_existing_folder("not-there-yet", folder, sizeof folder);
  assert_string_equal(folder, ".");
  vd_existing_folder("/not-there-yet", folder, sizeof folder);
  assert_string_equal(folder, "/");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_memory_of_the_host, setup, teardown),
      cmocka_unit_test_setup_teardown(test_groups_of_version_2, setup, teardown),
      cmocka_unit_test_setup_teardown(test_groups_of_version_1, setup, teardown),
      cmocka_unit_test_setup_teardown(test_groups_of_a_container, setup, teardown),
      cmocka_unit_test_setup_teardown(test_disk, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
