/* Advisory locks on files: one process at a time works in a run's folder or on a corpus. */
#ifndef VD_FILE_LOCK_H
#define VD_FILE_LOCK_H

#include "src/base/error.h"

#include <stdbool.h>

enum vd_lock_state {
  VD_LOCK_HELD,
  VD_LOCK_BUSY,       /* another process holds it */
  VD_LOCK_UNSUPPORTED /* the file system has no locks: errno says why */
};

enum { VD_LOCK_OWNER = 256 };

/* Not collective. Opens the lock file at `path` into *fd, which the caller closes; create: makes it where it is
 * missing. Without create *fd is -1 where there is none. VD_FAILED where it cannot be opened, or is anything but a lock
 * file: a link, no regular file, or a file with other text than vd_file_lock_sign() writes, which is left as it is. */
int vd_file_lock_open(const char *path, bool create, int *fd, vd_error *err);

/* Not collective. Locks an open file for this process; tries for three seconds, since a process that was just killed
 * may take a moment to go. The lock ends when the process ends or closes any descriptor of the file. VD_LOCK_BUSY:
 * owner [VD_LOCK_OWNER] gets what the holder wrote with vd_file_lock_sign(). */
enum vd_lock_state vd_file_lock(int fd, char *owner);

/* Not collective. Writes host and process number into a locked file, for people. A full disk is no error. */
void vd_file_lock_sign(int fd);

#endif
