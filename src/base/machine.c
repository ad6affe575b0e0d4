#include "src/base/machine.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { PATH_BYTES = 1024, LINE_BYTES = 512 };

/* The number in a file of one number; HUGE_VAL where there is none, or "max". */
static double read_number(const char *path) {
  char text[64] = "", *end;
  FILE *file = fopen(path, "re");
  if (!file) return HUGE_VAL;
  bool is_read = fgets(text, sizeof text, file) != NULL;
  fclose(file);
  double x = strtod(text, &end);
  return is_read && end != text ? x : HUGE_VAL;
}

/* The number behind `key` and blanks at the beginning of a line; HUGE_VAL where there is no such line. */
static double read_key(const char *path, const char *key) {
  char line[LINE_BYTES];
  double x = HUGE_VAL;
  size_t n = strlen(key);
  FILE *file = fopen(path, "re");
  while (file && x == HUGE_VAL && fgets(line, sizeof line, file))
    if (strncmp(line, key, n) == 0 && strchr(" \t", line[n])) x = strtod(line + n, NULL);
  if (file) fclose(file);
  return x;
}

/* Names of the files of one version of control groups. */
struct version {
  const char *mount, *limit, *usage, *cache[2];
};
static const struct version v1 = {"/sys/fs/cgroup/memory",
                                  "memory.limit_in_bytes",
                                  "memory.usage_in_bytes",
                                  {"total_inactive_file", "total_active_file"}};
static const struct version v2 = {"/sys/fs/cgroup", "memory.max", "memory.current", {"inactive_file", "active_file"}};

/* What the group at `path` still allows its processes. */
static double group_allows(const char *root, const struct version *v, const char *path) {
  char file[3 * PATH_BYTES];
  snprintf(file, sizeof file, "%s%s%s/%s", root, v->mount, path, v->limit);
  double limit = read_number(file);
  snprintf(file, sizeof file, "%s%s%s/%s", root, v->mount, path, v->usage);
  double usage = read_number(file);
  if (limit == HUGE_VAL || limit > 1e18 || usage == HUGE_VAL) return HUGE_VAL; /* v1 writes 2^63 for no limit */
  snprintf(file, sizeof file, "%s%s%s/memory.stat", root, v->mount, path);
  for (int i = 0; i < 2; i++) {
    double cache = read_key(file, v->cache[i]);
    if (cache != HUGE_VAL) usage -= cache;
  }
  return fmax(0.0, limit - fmax(0.0, usage));
}

/* The least that the group at `path` and those above it allow. In a container the path may be that of the host: its
 * own group then is the top of the mount. */
static double groups_allow(const char *root, const struct version *v, char *path) {
  double least = HUGE_VAL;
  for (;;) {
    if (strcmp(path, "/") == 0) *path = '\0';
    least = fmin(least, group_allows(root, v, path));
    char *slash = strrchr(path, '/');
    if (!slash) return least;
    *slash = '\0';
  }
}

/* Is `word` one of the words of a list with commas? */
static bool lists(const char *list, size_t n, const char *word) {
  size_t length = strlen(word);
  for (const char *p = list; p < list + n; p += strcspn(p, ",:") + 1)
    if (strcspn(p, ",:") == length && strncmp(p, word, length) == 0) return true;
  return false;
}

/* Lines of /proc/self/cgroup: "0::PATH" of version 2, "NUMBER:CONTROLLERS:PATH" of version 1. */
static double control_groups(const char *root) {
  char line[PATH_BYTES];
  double least = HUGE_VAL;
  snprintf(line, sizeof line, "%s/proc/self/cgroup", root);
  FILE *file = fopen(line, "re");
  while (file && fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = '\0';
    char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!path) continue;
    size_t n = (size_t)(path - controllers - 1);
    if (n == 0 || lists(controllers + 1, n, "memory"))
      least = fmin(least, groups_allow(root, n == 0 ? &v2 : &v1, path + 1));
  }
  if (file) fclose(file);
  return least;
}

double vd_host_memory(const char *root, char limit[VD_LIMIT_TEXT]) {
  char path[PATH_BYTES];
  snprintf(path, sizeof path, "%s/proc/meminfo", root);
  double free_kib = read_key(path, "MemAvailable:"), bytes = free_kib * 1024.0, group = control_groups(root);
  snprintf(limit, VD_LIMIT_TEXT, group < bytes ? "limit of the control group" : "MemAvailable");
  return fmin(bytes, group);
}

double vd_process_memory(void) {
  struct rlimit limit;
  double pages = 0;
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return HUGE_VAL;
  FILE *file = fopen("/proc/self/statm", "re");
  if (!file || fscanf(file, "%lf", &pages) != 1) pages = 0;
  if (file) fclose(file);
  return fmax(0.0, (double)limit.rlim_cur - pages * (double)sysconf(_SC_PAGESIZE));
}

void vd_existing_folder(const char *path, char *out, int size) {
  snprintf(out, (size_t)size, "%s", path);
  while (access(out, F_OK) != 0 && errno == ENOENT) {
    char *slash = strrchr(out, '/');
    if (!slash) {
      snprintf(out, (size_t)size, ".");
      return;
    }
    if (slash == out) slash++;
    *slash = '\0';
  }
}

double vd_disk_free(const char *path) {
  char folder[PATH_BYTES];
  struct statvfs disk;
  vd_existing_folder(path, folder, sizeof folder);
  if (statvfs(folder, &disk) != 0 || disk.f_blocks == 0) return HUGE_VAL;
  return (double)disk.f_bavail * (double)disk.f_frsize;
}
