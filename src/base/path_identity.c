#include "src/base/path_identity.h"

#include <dirent.h>
#include <errno.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_LINKS = 40 };

/* What a path leads to. A file that exists has an inode; every path has the nearest folder above it that exists, and
 * the rest of the path below that folder. */
typedef struct identity {
  bool exists;
  dev_t device, folder_device;
  ino_t inode, folder_inode;
  char *rest; /* the file's name; with missing folders before it where some are missing; for a pattern, ours */
} identity;

typedef struct entry {
  enum vd_path_role role;
  bool is_pattern, is_match; /* a pattern; a file that is there and matches one */
  char *name, *path;
  identity is;
} entry;

struct vd_path_list {
  entry *entry; /* [n] */
  size_t n, capacity;
};

vd_path_list *vd_path_list_create(void) {
  return vd_calloc(1, sizeof(vd_path_list));
}

void vd_path_list_destroy(vd_path_list *list) {
  if (!list) return;
  for (size_t i = 0; i < list->n; i++) {
    free(list->entry[i].name);
    free(list->entry[i].path);
    free(list->entry[i].is.rest);
  }
  free(list->entry);
  free(list);
}

static char *copy(const char *text) {
  size_t n = strlen(text) + 1;
  return memcpy(vd_calloc(n, 1), text, n);
}

/* Replaces a path that ends in a symbolic link without a file behind it by the place that the link names. */
static void follow_dangling_links(char path[PATH_MAX]) {
  char target[PATH_MAX], joined[2 * PATH_MAX + 2];
  for (int i = 0; i < MAX_LINKS; i++) {
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n <= 0) return;
    target[n] = '\0';
    const char *slash = strrchr(path, '/');
    int folder = slash && target[0] != '/' ? (int)(slash + 1 - path) : 0;
    snprintf(joined, sizeof joined, "%.*s%s", folder, path, target);
    if (strlen(joined) >= PATH_MAX) return;
    memcpy(path, joined, strlen(joined) + 1);
  }
}

/* Where a folder does not exist yet, "folder/.." leads to its own parent as soon as a command has made it: removes
 * both. Components that exist stay, since ".." behind a symbolic link does not lead back to the link's folder. */
static void drop_missing_parents(char path[PATH_MAX]) {
  char out[PATH_MAX], probe[PATH_MAX];
  size_t n = 0;
  if (path[0] == '/') out[n++] = '/';
  for (const char *c = path; *c;) {
    size_t length = strcspn(c, "/");
    struct stat st;
    memcpy(probe, out, n);
    probe[n] = '\0';
    bool is_parent = length == 2 && c[0] == '.' && c[1] == '.';
    if (is_parent && n > 0 && lstat(probe, &st) != 0 && errno == ENOENT) {
      while (n > 0 && out[n - 1] == '/') n--;
      while (n > 0 && out[n - 1] != '/') n--;
    } else if (length > 0 && !(length == 1 && c[0] == '.')) {
      memcpy(out + n, c, length);
      n += length;
      if (c[length] == '/') out[n++] = '/';
    }
    c += length + (c[length] == '/');
  }
  if (n == 0) out[n++] = '.';
  memcpy(path, out, n);
  path[n] = '\0';
}

/* Splits off the last component, slashes before it included: `path` becomes the folder, *name a place behind it. */
static void split_last(char *path, char *name, size_t size) {
  size_t n = strlen(path);
  while (n > 1 && path[n - 1] == '/') path[--n] = '\0';
  char *slash = strrchr(path, '/');
  snprintf(name, size, "%s", slash ? slash + 1 : path);
  if (!slash)
    snprintf(path, PATH_MAX, ".");
  else if (slash == path)
    path[1] = '\0';
  else
    *slash = '\0';
}

/* Fills folder and rest from a path whose last component counts as a file. */
static void identify_in_folder(const char *path, identity *is) {
  char folder[PATH_MAX], name[PATH_MAX], rest[PATH_MAX] = "", joined[2 * PATH_MAX];
  struct stat st;
  snprintf(folder, sizeof folder, "%s", path);
  do {
    split_last(folder, name, sizeof name);
    if (name[0] && strcmp(name, ".") != 0) {
      snprintf(joined, sizeof joined, "%s%s%s", name, rest[0] ? "/" : "", rest);
      snprintf(rest, sizeof rest, "%.*s", PATH_MAX - 1, joined);
    }
  } while (stat(folder, &st) != 0 && errno == ENOENT && strcmp(folder, "/") != 0 && strcmp(folder, ".") != 0);
  is->rest = copy(rest);
  if (stat(folder, &st) != 0) return;
  is->folder_device = st.st_dev;
  is->folder_inode = st.st_ino;
}

static void identify(const char *path, identity *is) {
  char place[PATH_MAX];
  struct stat st;
  snprintf(place, sizeof place, "%s", path);
  drop_missing_parents(place);
  is->exists = stat(place, &st) == 0;
  if (is->exists) {
    is->device = st.st_dev;
    is->inode = st.st_ino;
    char *real = realpath(place, NULL);
    if (real) snprintf(place, sizeof place, "%s", real);
    free(real);
  } else {
    follow_dangling_links(place);
  }
  identify_in_folder(place, is);
}

static entry *append(vd_path_list *list, enum vd_path_role role, const char *name, const char *path) {
  if (list->n == list->capacity) {
    size_t capacity = list->capacity ? 2 * list->capacity : 16;
    entry *larger = vd_calloc(capacity, sizeof *larger);
    if (list->n > 0) memcpy(larger, list->entry, list->n * sizeof *larger);
    free(list->entry);
    list->entry = larger;
    list->capacity = capacity;
  }
  entry *e = &list->entry[list->n++];
  *e = (entry){.role = role, .name = copy(name), .path = copy(path)};
  return e;
}

void vd_path_list_add(vd_path_list *list, enum vd_path_role role, const char *name, const char *path) {
  if (!path[0]) return;
  identify(path, &append(list, role, name, path)->is);
}

void vd_path_list_add_pattern(vd_path_list *list, enum vd_path_role role, const char *name, const char *folder,
                              const char *prefix, const char *pattern) {
  char path[2 * PATH_MAX], place[PATH_MAX], escaped[2 * NAME_MAX + 2] = "";
  for (size_t n = 0; *prefix && n + 2 < sizeof escaped; prefix++) {
    if (strchr("*?[]\\", *prefix)) escaped[n++] = '\\';
    escaped[n++] = *prefix;
  }
  snprintf(place, sizeof place, "%s", folder);
  drop_missing_parents(place);
  snprintf(path, sizeof path, "%s/%s%s", place, escaped, pattern);
  entry *e = append(list, role, name, path);
  e->is_pattern = true;
  identify_in_folder(path, &e->is);
  const char *match = strrchr(path, '/') + 1;
  DIR *dir = opendir(place);
  for (struct dirent *d; dir && (d = readdir(dir)) != NULL;) {
    char there[2 * PATH_MAX];
    if (fnmatch(match, d->d_name, 0) != 0) continue;
    snprintf(there, sizeof there, "%s/%s", place, d->d_name);
    e = append(list, role, name, there);
    e->is_match = true;
    identify(there, &e->is);
  }
  if (dir) closedir(dir);
}

static bool same_folder(const identity *a, const identity *b) {
  return a->folder_inode != 0 && a->folder_inode == b->folder_inode && a->folder_device == b->folder_device;
}

static bool is_same(const entry *a, const entry *b) {
  if (a->is_pattern) return same_folder(&a->is, &b->is) && fnmatch(a->is.rest, b->is.rest, FNM_PATHNAME) == 0;
  if (b->is_pattern) return is_same(b, a);
  if (a->is.exists && b->is.exists && a->is.device == b->is.device && a->is.inode == b->is.inode) return true;
  return same_folder(&a->is, &b->is) && strcmp(a->is.rest, b->is.rest) == 0;
}

static bool is_conflict(const entry *a, const entry *b) {
  if (a->role != VD_PATH_OUTPUT && b->role != VD_PATH_OUTPUT) return false;
  bool of_pattern_a = a->is_pattern || a->is_match, of_pattern_b = b->is_pattern || b->is_match;
  if (of_pattern_a && (of_pattern_b || b->role == VD_PATH_RESUMED)) return false;
  if (of_pattern_b && a->role == VD_PATH_RESUMED) return false;
  return is_same(a, b);
}

int vd_path_list_check(const vd_path_list *list, vd_error *err) {
  for (size_t i = 0; i < list->n; i++) {
    for (size_t k = i + 1; k < list->n; k++) {
      const entry *a = &list->entry[i], *b = &list->entry[k];
      if (!is_conflict(a, b)) continue;
      if (a->role != VD_PATH_OUTPUT) a = b, b = &list->entry[i];
      return vd_fail(err, VD_USAGE,
                     "%s = '%s' is the same file as %s = '%s', which would be overwritten: nothing was written",
                     a->name, a->path, b->name, b->path);
    }
  }
  return VD_OK;
}
