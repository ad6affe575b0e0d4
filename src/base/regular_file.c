#include "src/base/regular_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a folder";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  return S_ISREG(mode) ? NULL : "a device";
}

int vd_open_regular(const char *path, int *fd, int64_t *size, vd_error *err) {
  struct stat info;
  *fd = -1;
  if (stat(path, &info) != 0) return vd_fail(err, VD_FAILED, "cannot open %s: %s", path, strerror(errno));
  if (kind_of(info.st_mode))
    return vd_fail(err, VD_FAILED, "%s is not a regular file but %s", path, kind_of(info.st_mode));
  /* Without O_NONBLOCK a FIFO that takes the name just now would block. */
  int opened = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  if (opened < 0) return vd_fail(err, VD_FAILED, "cannot open %s: %s", path, strerror(errno));
  if (fstat(opened, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(opened);
    return vd_fail(err, VD_FAILED, "%s is not a regular file any more", path);
  }
  *fd = opened;
  if (size) *size = (int64_t)info.st_size;
  return VD_OK;
}

int vd_read_regular(const char *path, int64_t most, char **bytes, size_t *n, vd_error *err) {
  int64_t size = 0;
  int fd;
  *n = 0;
  *bytes = NULL;
  if (vd_open_regular(path, &fd, &size, err)) return err->status;
  if (size > most) {
    close(fd);
    return vd_fail(err, VD_FAILED, "%s is longer than %lld bytes", path, (long long)most);
  }
  *bytes = vd_calloc((size_t)size + 1, 1);
  while (*n < (size_t)size && err->status == VD_OK) {
    ssize_t got = read(fd, *bytes + *n, (size_t)size - *n);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) vd_fail(err, VD_FAILED, "cannot read %s: %s", path, strerror(errno));
    if (got == 0) vd_fail(err, VD_FAILED, "%s became shorter while it was read", path);
    if (got > 0) *n += (size_t)got;
  }
  close(fd);
  return err->status;
}
