#include "src/base/regular_file.h"

#include <errno.h>
#include <fcntl.h>
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
