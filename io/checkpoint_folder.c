/* The folder of checkpoints: names, links, pruning, and the newest that is whole. */
#include "io/checkpoint.h"
#include "io/digest.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NAME_BYTES = 64 };

static void file_name(int64_t update, char name[NAME_BYTES]) {
  snprintf(name, NAME_BYTES, "update-%08lld.h5", (long long)update);
}

void vd_checkpoint_path(const char *directory, int64_t update, char *path, size_t size) {
  char name[NAME_BYTES];
  file_name(update, name);
  if (snprintf(path, size, "%s/checkpoints/%s", directory, name) >= (int)size)
    vd_bug("the path of a checkpoint in %s is too long", directory);
}

/* The update of a checkpoint's name, -1 when it is not one. */
static int64_t update_of(const char *name) {
  char again[NAME_BYTES];
  if (strncmp(name, "update-", 7) != 0 || !isdigit((unsigned char)name[7])) return -1;
  int64_t update = strtoll(name + 7, NULL, 10);
  file_name(update, again);
  return strcmp(name, again) == 0 ? update : -1;
}

static int newest_first(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

/* What is in a folder of checkpoints. */
typedef struct listing {
  int64_t *update; /* [n], newest first */
  size_t n;
  char (*temporary)[256]; /* [n_temporary]; a name has at most 255 bytes */
  size_t n_temporary;
} listing;

static void *grow(void *list, size_t n, size_t size) {
  void *more = realloc(list, (n + 1) * size);
  if (!more) vd_bug("no memory for %zu names", n + 1);
  return more;
}

static bool is_regular(const char *folder, const char *name) {
  char path[1300];
  struct stat info;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

/* A temporary of a file that a run writes among its checkpoints. */
static bool is_own_temporary(const char *name) {
  return vd_is_temporary(name, "last.h5") || vd_is_temporary(name, "best.h5") ||
         (strncmp(name, ".update-", 8) == 0 && vd_is_temporary(name, NULL));
}

/* Reads the folder; one that does not exist is empty. Free with forget(). */
static int list_folder(listing *l, const char *folder, vd_error *err) {
  *l = (listing){0};
  DIR *dir = opendir(folder);
  if (!dir && errno == ENOENT) return VD_OK;
  if (!dir) return vd_fail(err, VD_FAILED, "cannot read the folder %s: %s", folder, strerror(errno));
  for (const struct dirent *entry; (entry = readdir(dir)) != NULL;) {
    int64_t update = update_of(entry->d_name);
    if (update >= 0) {
      l->update = grow(l->update, l->n, sizeof *l->update);
      l->update[l->n++] = update;
    } else if (is_own_temporary(entry->d_name)) {
      l->temporary = grow(l->temporary, l->n_temporary, sizeof *l->temporary);
      snprintf(l->temporary[l->n_temporary++], sizeof *l->temporary, "%s", entry->d_name);
    }
  }
  closedir(dir);
  if (l->n) qsort(l->update, l->n, sizeof *l->update, newest_first);
  return VD_OK;
}

static void forget(listing *l) {
  free(l->update);
  free(l->temporary);
}

int vd_checkpoint_link(const char *directory, const char *link, int64_t update, vd_error *err) {
  char name[NAME_BYTES], path[1024], at[1024];
  vd_atomic_file f;
  file_name(update, name);
  vd_checkpoint_path(directory, update, path, sizeof path);
  if (access(path, F_OK) != 0) return vd_fail(err, VD_FAILED, "cannot link to %s: %s", path, strerror(errno));
  snprintf(at, sizeof at, "%s/checkpoints/%s.h5", directory, link);
  if (vd_atomic_begin(&f, at, err)) return err->status;
  unlink(f.temporary); /* of a killed process that had the same number */
  if (symlink(name, f.temporary) != 0)
    return vd_fail(err, VD_FAILED, "cannot make the link %s: %s", at, strerror(errno));
  return vd_atomic_replace(&f, err);
}

int vd_checkpoint_check_names(const char *directory, vd_error *err) {
  char folder[1024];
  snprintf(folder, sizeof folder, "%s/checkpoints", directory);
  static const char *const links[] = {"last.h5", "best.h5"};
  for (int i = 0; i < 2; i++) {
    char path[1100];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", folder, links[i]);
    if (lstat(path, &info) == 0 && !S_ISLNK(info.st_mode))
      return vd_fail(err, VD_USAGE,
                     "%s is not the link that a run makes and would replace: name it update-NNNNNNNN.h5 by its updates "
                     "to resume from it, give it as run%%resume, or move it away",
                     path);
  }
  listing l;
  if (list_folder(&l, folder, err)) return err->status;
  size_t n = l.n;
  forget(&l);
  DIR *dir = n == 0 ? opendir(folder) : NULL;
  for (const struct dirent *entry; dir && err->status == VD_OK && (entry = readdir(dir)) != NULL;) {
    size_t length = strlen(entry->d_name);
    bool h5 = length > 3 && strcmp(entry->d_name + length - 3, ".h5") == 0 && entry->d_name[0] != '.';
    if (h5 && is_regular(folder, entry->d_name))
      vd_fail(err, VD_USAGE,
              "%s holds %s but no checkpoint under the name of a run's own, update-NNNNNNNN.h5: name it so, give it as "
              "run%%resume, or move it away",
              folder, entry->d_name);
  }
  if (dir) closedir(dir);
  return err->status;
}

/* The update that the link names, -1 when there is no such link. */
static int64_t link_target(const char *folder, const char *link) {
  char path[1100], target[1024];
  snprintf(path, sizeof path, "%s/%s", folder, link);
  ssize_t n = readlink(path, target, sizeof target - 1);
  if (n < 0) return -1;
  target[n] = '\0';
  return update_of(target);
}

static int remove_file(const char *folder, const char *name, vd_error *err) {
  char path[1300];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  if (unlink(path) != 0 && errno != ENOENT)
    return vd_fail(err, VD_FAILED, "cannot remove %s: %s", path, strerror(errno));
  return VD_OK;
}

int vd_checkpoint_prune(const char *directory, int64_t keep, vd_error *err) {
  char folder[1024], name[NAME_BYTES];
  if (keep < 1) vd_bug("at least one checkpoint must be kept, not %lld", (long long)keep);
  snprintf(folder, sizeof folder, "%s/checkpoints", directory);
  listing l;
  if (list_folder(&l, folder, err)) return err->status;
  int64_t last = link_target(folder, "last.h5"), best = link_target(folder, "best.h5");
  for (size_t i = (size_t)keep; i < l.n && err->status == VD_OK; i++) {
    file_name(l.update[i], name);
    if (l.update[i] == last || l.update[i] == best || !is_regular(folder, name)) continue;
    remove_file(folder, name, err);
  }
  for (size_t i = 0; i < l.n_temporary && err->status == VD_OK; i++) remove_file(folder, l.temporary[i], err);
  forget(&l);
  return err->status;
}

int vd_checkpoint_newest(vd_h5 *h5, const char *directory, char *path, size_t size, char *warning, size_t warning_size,
                         vd_error *err) {
  char folder[1024], tried[1024];
  path[0] = warning[0] = '\0';
  snprintf(folder, sizeof folder, "%s/checkpoints", directory);
  listing l;
  if (list_folder(&l, folder, err)) return err->status;
  size_t used = 0;
  for (size_t i = 0; i < l.n && !path[0]; i++) {
    vd_error why = {0}, damage = {0};
    vd_checkpoint *c;
    vd_checkpoint_path(directory, l.update[i], tried, sizeof tried);
    if (vd_checkpoint_open(&c, h5, tried, true, &why) == VD_OK) {
      vd_checkpoint_close(&c);
      if (snprintf(path, size, "%s", tried) >= (int)size) vd_bug("the path is too long: %s", tried);
    } else if (vd_digest_check(tried, NULL, &damage) == VD_OK) {
      /* A whole file that cannot be opened, of a newer Viaduct say: an older one is no substitute for it. */
      *err = why;
      break;
    } else if (used < warning_size) {
      used += (size_t)snprintf(warning + used, warning_size - used, "%s%s", used ? "\n" : "", why.message);
    }
  }
  if (err->status == VD_OK && l.n > 0 && !path[0])
    vd_fail(err, VD_FAILED, "all %zu checkpoints in %s are damaged:\n%s", l.n, folder, warning);
  forget(&l);
  return err->status;
}
