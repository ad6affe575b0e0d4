#include "src/base/file_lock.h"

#include "src/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { TRIES = 30 }; /* a tenth of a second apart */

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
  int n = snprintf(owner, sizeof owner, "host %s, process %ld\n", host, (long)getpid());
  if (ftruncate(fd, 0) != 0 || pwrite(fd, owner, (size_t)n, 0) != n) (void)!ftruncate(fd, 0);
}
