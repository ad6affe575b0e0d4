/* A seal at the end of a file: the SHA-256 of all bytes before it. HDF5 ignores bytes after its own end, so that every
 * HDF5 reader opens a sealed file. Viaduct compares the digest before HDF5 parses the file: HDF5's checksums do not
 * cover all bytes, and its parser may crash on damage that they miss. */
#ifndef VD_DIGEST_H
#define VD_DIGEST_H

#include "src/base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Not collective. Appends the seal to a closed file; not synced. VD_FAILED naming the file (the disk is full ...). */
int vd_digest_seal(const char *path, vd_error *err);

/* Not collective. Reads the file whole and compares with its seal. *sealed (may be NULL): false when there is no seal
 * at its end at all, a truncated or foreign file. VD_FAILED naming the file unless the seal is there and right. */
int vd_digest_check(const char *path, bool *sealed, vd_error *err);

enum { VD_DIGEST_TEXT = 65, VD_DIGEST_BYTES = 32, VD_DIGEST_SEAL = 81 /* bytes of a seal */ };
/* Not collective. The hexadecimal digits of the seal at the end of `path`, not compared, into hex. VD_FAILED naming the
 * file when there is no seal. */
int vd_digest_text(const char *path, char hex[VD_DIGEST_TEXT], vd_error *err);

/* Not collective. The SHA-256 of data [n] into digest. */
void vd_digest_bytes(const void *data, size_t n, uint8_t digest[VD_DIGEST_BYTES]);

#endif
