#include "src/base/file_lock.h"

#include "src/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TRIES = 30 }; /* a tenth of a second apart */

#define OWNER_FORMAT "host %s, process %ld\n"

/* The file is empty, or holds what vd_file_lock_sign() writes. */
static bool is_lock_file(int fd) {
  struct stat info;
  char text[VD_LOCK_OWNER] = "", host[VD_LOCK_OWNER] = "", again[2 * VD_LOCK_OWNER];
  long process = 0;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size >= VD_LOCK_OWNER) return false;
  /* What is read decides whether it is empty: its holder may empty it to sign it after fstat() saw another text. */
  ssize_t n = pread(fd, text, sizeof text - 1, 0);
  if (n <= 0) return n == 0;
  if (sscanf(text, "host %255[^,], process %ld", host, &process) != 2) return false;
  snprintf(again, sizeof again, OWNER_FORMAT, host, process);
  return strcmp(text, again) == 0;
}

int vd_file_lock_open(const char *path, bool create, int *fd, vd_error *err) {
  *fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | (create ? O_CREAT : 0), 0666);
  if (*fd < 0 && !create && (errno == ENOENT || errno == ENOTDIR)) return VD_OK;
  if (*fd < 0 && errno != ELOOP) return vd_fail(err, VD_FAILED, "cannot open %s: %s", path, strerror(errno));
  if (*fd >= 0 && is_lock_file(*fd)) return VD_OK;
  if (*fd >= 0) close(*fd);
  *fd = -1;
  return vd_fail(err, VD_FAILED, "%s is in the place of a lock file but is none of Viaduct's: move it away", path);
}

enum vd_lock_state vd_file_lock(int fd, char *owner) {
  for (int i = 0; i < TRIES; i++) {
    /* A lock of the process, not of the descriptor: it passes to no child, and works between the hosts of an NFS. */
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (i > 0) vd_clock_sleep(0.1);
    if (fcntl(fd, F_SETLK, &lock) == 0) return VD_LOCK_HELD;
    if (errno != EAGAIN && errno != EACCES && errno != EINTR) return VD_LOCK_UNSUPPORTED;
  }
  ssize_t n = pread(fd, owner, VD_LOCK_OWNER - 1, 0);
  owner[n > 0 ? n : 0] = '\0';
  owner[strcspn(owner, "\n")] = '\0';
  return VD_LOCK_BUSY;
}

void vd_file_lock_sign(int fd) {
  char host[128] = "", owner[VD_LOCK_OWNER];
  gethostname(host, sizeof host - 1);
  int n = snprintf(owner, sizeof owner, OWNER_FORMAT, host, (long)getpid());
  if (ftruncate(fd, 0) != 0 || pwrite(fd, owner, (size_t)n, 0) != n) (void)!ftruncate(fd, 0);
}
