#include "io/digest.h"
#include "src/base/regular_file.h"

#include <errno.h>
#include <fcntl.h>
#include <nettle/sha2.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* "\nviaduct sha256 " + 64 hexadecimal digits + "\n": text, so that `tail -c 80` shows it and sha256sum can redo it. */
#define MARK "\nviaduct sha256 "
enum { MARK_BYTES = sizeof MARK - 1, HEX_BYTES = 2 * SHA256_DIGEST_SIZE, SEAL_BYTES = MARK_BYTES + HEX_BYTES + 1 };
enum { BUFFER_BYTES = 1 << 20 };
_Static_assert((int)SEAL_BYTES == (int)VD_DIGEST_SEAL && SHA256_DIGEST_SIZE == VD_DIGEST_BYTES, "sizes of digest.h");

void vd_digest_bytes(const void *data, size_t n, uint8_t digest[VD_DIGEST_BYTES]) {
  struct sha256_ctx state;
  sha256_init(&state);
  sha256_update(&state, n, data);
  sha256_digest(&state, VD_DIGEST_BYTES, digest);
}

/* The digest of the first n bytes of fd, as hexadecimal text. */
static int digest_of(int fd, const char *path, int64_t n, char hex[HEX_BYTES + 1], vd_error *err) {
  struct sha256_ctx state;
  sha256_init(&state);
  uint8_t *buffer = vd_calloc(BUFFER_BYTES, 1), digest[SHA256_DIGEST_SIZE];
  for (int64_t at = 0; at < n && err->status == VD_OK;) {
    size_t want = n - at < BUFFER_BYTES ? (size_t)(n - at) : BUFFER_BYTES;
    ssize_t got = pread(fd, buffer, want, at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) vd_fail(err, VD_FAILED, "cannot read %s at byte %lld: %s", path, (long long)at, strerror(errno));
    if (got == 0) vd_fail(err, VD_FAILED, "%s became shorter while it was read", path);
    if (got <= 0) break;
    sha256_update(&state, (size_t)got, buffer);
    at += got;
  }
  free(buffer);
  sha256_digest(&state, sizeof digest, digest);
  for (int i = 0; i < SHA256_DIGEST_SIZE; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
  return err->status;
}

int vd_digest_seal(const char *path, vd_error *err) {
  int fd = open(path, O_RDWR | O_APPEND | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0) {
    int reason = errno;
    if (fd >= 0) close(fd);
    return vd_fail(err, VD_FAILED, "cannot open %s: %s", path, strerror(reason));
  }
  char hex[HEX_BYTES + 1], seal[SEAL_BYTES + 1];
  if (digest_of(fd, path, info.st_size, hex, err) == VD_OK) {
    snprintf(seal, sizeof seal, MARK "%s\n", hex);
    errno = ENOSPC; /* what a short write means */
    if (write(fd, seal, SEAL_BYTES) != SEAL_BYTES)
      vd_fail(err, VD_FAILED, "cannot write the end of %s: %s", path, strerror(errno));
  }
  if (close(fd) != 0) vd_fail(err, VD_FAILED, "cannot close %s: %s", path, strerror(errno));
  return err->status;
}

/* Reads the seal at the end of a file of `size` bytes. */
static int read_seal(int fd, const char *path, int64_t size, char seal[SEAL_BYTES + 1], vd_error *err) {
  int64_t n = size - SEAL_BYTES;
  memset(seal, 0, SEAL_BYTES + 1);
  if (size == 0) return vd_fail(err, VD_FAILED, "%s is empty", path);
  if (n < 0 || pread(fd, seal, SEAL_BYTES, n) != SEAL_BYTES || memcmp(seal, MARK, MARK_BYTES) != 0 ||
      seal[SEAL_BYTES - 1] != '\n')
    return vd_fail(err, VD_FAILED, "%s has no digest at its end: it is truncated, damaged, or of another make", path);
  return VD_OK;
}

int vd_digest_text(const char *path, char hex[VD_DIGEST_TEXT], vd_error *err) {
  int fd;
  int64_t size;
  char seal[SEAL_BYTES + 1];
  if (vd_open_regular(path, &fd, &size, err)) return err->status;
  if (read_seal(fd, path, size, seal, err) == VD_OK)
    snprintf(hex, VD_DIGEST_TEXT, "%.*s", HEX_BYTES, seal + MARK_BYTES);
  close(fd);
  return err->status;
}

int vd_digest_check(const char *path, bool *sealed, vd_error *err) {
  if (sealed) *sealed = false;
  int fd;
  int64_t size;
  if (vd_open_regular(path, &fd, &size, err)) return err->status;
  char hex[HEX_BYTES + 1], seal[SEAL_BYTES + 1];
  if (read_seal(fd, path, size, seal, err) == VD_OK && digest_of(fd, path, size - SEAL_BYTES, hex, err) == VD_OK) {
    if (sealed) *sealed = true;
    if (memcmp(seal + MARK_BYTES, hex, HEX_BYTES) != 0)
      vd_fail(err, VD_FAILED, "%s is damaged: its SHA-256 is not the one at its end", path);
  }
  close(fd);
  return err->status;
}
