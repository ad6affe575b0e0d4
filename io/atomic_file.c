#include "io/atomic_file.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char *vd_split_path(const char *path, char *folder, size_t size) {
  const char *slash = strrchr(path, '/');
  if (!slash)
    snprintf(folder, size, ".");
  else
    snprintf(folder, size, "%.*s", slash == path ? 1 : (int)(slash - path), path);
  return slash ? slash + 1 : path;
}

int vd_atomic_begin(vd_atomic_file *f, const char *path, vd_error *err) {
  char folder[1024];
  struct stat there;
  f->temporary[0] = '\0';
  if (strlen(path) >= sizeof f->path) return vd_fail(err, VD_FAILED, "the path is too long: %s", path);
  snprintf(f->path, sizeof f->path, "%s", path);
  const char *name = vd_split_path(path, folder, sizeof folder);
  if (access(folder, W_OK | X_OK) != 0)
    return vd_fail(err, VD_FAILED, "cannot write %s: folder %s: %s", path, folder, strerror(errno));
  if (lstat(path, &there) == 0 && !S_ISREG(there.st_mode) && !S_ISLNK(there.st_mode))
    return vd_fail(err, VD_FAILED, "cannot write %s: it is there and not a regular file", path);
  snprintf(f->temporary, sizeof f->temporary, "%.*s.%s.tmp-%ld", (int)(name - path), path, name, (long)getpid());
  return VD_OK;
}

int vd_atomic_create(const vd_atomic_file *f, int flags, int *fd, vd_error *err) {
  *fd = open(f->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | flags, 0666);
  if (*fd < 0) vd_fail(err, VD_FAILED, "cannot create %s: %s", f->temporary, strerror(errno));
  return err->status;
}

static int sync_path(const char *path, int flags, vd_error *err) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
  /* Some file systems cannot sync a folder (EINVAL); nothing more can be done on them. */
  if (fd < 0 || (fsync(fd) != 0 && !(errno == EINVAL && (flags & O_DIRECTORY))))
    vd_fail(err, VD_FAILED, "cannot sync %s: %s", path, strerror(errno));
  if (fd >= 0) close(fd);
  return err->status;
}

int vd_sync_folder(const char *path, vd_error *err) {
  char folder[1024];
  vd_split_path(path, folder, sizeof folder);
  return sync_path(folder, O_DIRECTORY, err);
}

int vd_atomic_replace(vd_atomic_file *f, vd_error *err) {
  if (rename(f->temporary, f->path) != 0) {
    vd_fail(err, VD_FAILED, "cannot rename %s to %s: %s", f->temporary, f->path, strerror(errno));
    vd_atomic_abandon(f);
    return err->status;
  }
  f->temporary[0] = '\0';
  return vd_sync_folder(f->path, err);
}

int vd_atomic_commit(vd_atomic_file *f, vd_error *err) {
  if (sync_path(f->temporary, 0, err)) {
    vd_atomic_abandon(f);
    return err->status;
  }
  return vd_atomic_replace(f, err);
}

void vd_atomic_abandon(vd_atomic_file *f) {
  if (f->temporary[0]) unlink(f->temporary);
  f->temporary[0] = '\0';
}

int vd_write_all(int fd, const char *path, const char *data, size_t n, vd_error *err) {
  while (n > 0) {
    ssize_t done = write(fd, data, n);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return vd_fail(err, VD_FAILED, "cannot write %s: %s", path, strerror(errno));
    data += done;
    n -= (size_t)done;
  }
  return VD_OK;
}

int vd_atomic_write(const char *path, const char *text, size_t n, vd_error *err) {
  vd_atomic_file f;
  int fd = -1;
  if (vd_atomic_begin(&f, path, err) || vd_atomic_create(&f, 0, &fd, err)) return err->status;
  vd_write_all(fd, path, text, n, err);
  if (close(fd) != 0) vd_fail(err, VD_FAILED, "cannot write %s: %s", path, strerror(errno));
  if (err->status)
    vd_atomic_abandon(&f);
  else
    vd_atomic_commit(&f, err);
  return err->status;
}

bool vd_is_temporary(const char *name, const char *of) {
  const char *mark = strstr(name, ".tmp-");
  if (name[0] != '.' || !mark) return false;
  for (const char *next; (next = strstr(mark + 1, ".tmp-")) != NULL;) mark = next;
  if (of && (strlen(of) != (size_t)(mark - name - 1) || strncmp(name + 1, of, strlen(of)) != 0)) return false;
  const char *digit = mark + 5;
  while (isdigit((unsigned char)*digit)) digit++;
  return digit > mark + 5 && *digit == '\0';
}

int vd_make_folder(const char *path, vd_error *err) {
  char part[1024];
  struct stat info;
  size_t n = strlen(path);
  if (n == 0 || n >= sizeof part) return vd_fail(err, VD_FAILED, "the path is empty or too long: %s", path);
  memcpy(part, path, n + 1);
  for (size_t i = 1; i <= n && err->status == VD_OK; i++) {
    if (path[i] != '/' && path[i] != '\0') continue;
    part[i] = '\0';
    if (mkdir(part, 0777) == 0)
      vd_sync_folder(part, err);
    else if (errno != EEXIST)
      vd_fail(err, VD_FAILED, "cannot make the folder %s: %s", part, strerror(errno));
    part[i] = path[i];
  }
  if (err->status) return err->status;
  if (stat(path, &info) != 0) return vd_fail(err, VD_FAILED, "%s: %s", path, strerror(errno));
  if (!S_ISDIR(info.st_mode)) return vd_fail(err, VD_FAILED, "%s is not a folder", path);
  return VD_OK;
}
