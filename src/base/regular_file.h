/* Opening what a user names for reading: a FIFO, a socket or a device would block, or answer, when it is opened. */
#ifndef VD_REGULAR_FILE_H
#define VD_REGULAR_FILE_H

#include "src/base/error.h"

#include <stdint.h>

/* Not collective. Opens the regular file at `path` (links followed) for reading: its descriptor in *fd, which the
 * caller closes, and its size in bytes in *size (NULL: not wanted). VD_FAILED with the path, and *fd -1, where there is
 * no such file, or where it is a folder, a FIFO, a socket or a device, which is not opened. */
int vd_open_regular(const char *path, int *fd, int64_t *size, vd_error *err);

/* Not collective. Reads the regular file at `path` whole: *bytes [*n], which the caller frees, also on error, and a
 * zero behind them. VD_FAILED as above, and where it is longer than `most` bytes or cannot be read. */
int vd_read_regular(const char *path, int64_t most, char **bytes, size_t *n, vd_error *err);

#endif
