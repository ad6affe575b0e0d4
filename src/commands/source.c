#include "src/commands/source.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUFFER = 1 << 20 };

struct vd_source_file {
  char *path;
  const char *kind;
  int fd;                  /* plain files and, below the archive, the others */
  struct archive *archive; /* NULL where plain */
  int64_t size, at;        /* of the file on disk; bytes of it read (plain) */
  uint8_t *waste;          /* [BUFFER], for skipping */
};

static const char *kind_of(const uint8_t *head, ssize_t n) {
  if (n >= 4 && memcmp(head, "PK\3\4", 4) == 0) return "zip";
  if (n >= 3 && memcmp(head, "\x1f\x8b\x08", 3) == 0) return "gzip";
  if (n >= 6 && memcmp(head,
                       "\xfd"
                       "7zXZ\0",
                       6) == 0)
    return "xz";
  return "plain";
}

/* The next regular file of a zip; ARCHIVE_EOF when there is none. */
static int next_file(struct archive *a) {
  struct archive_entry *entry;
  int status;
  do status = archive_read_next_header(a, &entry);
  while (status == ARCHIVE_OK && archive_entry_filetype(entry) == AE_IFDIR);
  return status;
}

static int damaged(const vd_source_file *s, vd_error *err) {
  const char *reason = archive_error_string(s->archive);
  return vd_fail(err, VD_FAILED, "cannot read %s (%s): %s", s->path, s->kind, reason ? reason : "it is damaged");
}

static int open_archive(vd_source_file *s, vd_error *err) {
  s->archive = archive_read_new();
  if (!s->archive) return vd_fail(err, VD_FAILED, "cannot start libarchive");
  if (strcmp(s->kind, "zip") == 0) {
    archive_read_support_format_zip(s->archive);
  } else {
    archive_read_support_format_raw(s->archive);
    if (strcmp(s->kind, "gzip") == 0)
      archive_read_support_filter_gzip(s->archive);
    else
      archive_read_support_filter_xz(s->archive);
  }
  if (archive_read_open_fd(s->archive, s->fd, BUFFER) != ARCHIVE_OK) return damaged(s, err);
  int status = next_file(s->archive);
  if (status == ARCHIVE_EOF) return vd_fail(err, VD_FAILED, "%s (%s) holds no file", s->path, s->kind);
  if (status != ARCHIVE_OK) return damaged(s, err);
  return VD_OK;
}

int vd_source_open(vd_source_file **source, const char *path, vd_error *err) {
  *source = NULL;
  vd_source_file *s = vd_calloc(1, sizeof *s);
  s->path = vd_calloc(strlen(path) + 1, 1);
  memcpy(s->path, path, strlen(path));
  s->fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat st;
  uint8_t head[6];
  if (s->fd < 0 || fstat(s->fd, &st) != 0)
    vd_fail(err, VD_FAILED, "cannot open %s: %s", path, strerror(errno));
  else if (!S_ISREG(st.st_mode))
    vd_fail(err, VD_FAILED, "%s is not a file (a pipe cannot be read twice)", path);
  if (err->status == VD_OK) {
    s->size = st.st_size;
    ssize_t n = pread(s->fd, head, sizeof head, 0);
    if (n < 0) vd_fail(err, VD_FAILED, "cannot read %s: %s", path, strerror(errno));
    s->kind = kind_of(head, n);
    if (err->status == VD_OK && strcmp(s->kind, "plain") != 0) open_archive(s, err);
  }
  if (err->status)
    vd_source_close(s);
  else
    *source = s;
  return err->status;
}

static int read_archive(vd_source_file *s, uint8_t *to, int64_t size, int64_t *n, vd_error *err) {
  la_ssize_t got = archive_read_data(s->archive, to, (size_t)size);
  if (got < 0) return damaged(s, err);
  *n = got;
  if (got > 0 || strcmp(s->kind, "zip") != 0) return VD_OK;
  int status = next_file(s->archive);
  if (status == ARCHIVE_OK) return vd_fail(err, VD_FAILED, "%s (zip) holds more than one file", s->path);
  if (status != ARCHIVE_EOF) return damaged(s, err);
  return VD_OK;
}

int vd_source_read(vd_source_file *s, uint8_t *to, int64_t size, int64_t *n, vd_error *err) {
  *n = 0;
  if (s->archive) return read_archive(s, to, size, n, err);
  ssize_t got;
  do got = pread(s->fd, to, (size_t)size, s->at);
  while (got < 0 && errno == EINTR);
  if (got < 0) return vd_fail(err, VD_FAILED, "cannot read %s: %s", s->path, strerror(errno));
  s->at += got;
  *n = got;
  return VD_OK;
}

int vd_source_skip(vd_source_file *s, int64_t n, vd_error *err) {
  if (!s->archive && s->size - s->at >= n) {
    s->at += n;
    return VD_OK;
  }
  if (!s->waste) s->waste = vd_calloc(BUFFER, 1);
  while (n > 0) {
    int64_t got = 0;
    if (vd_source_read(s, s->waste, n < BUFFER ? n : BUFFER, &got, err)) return err->status;
    if (got == 0) return vd_fail(err, VD_FAILED, "%s became shorter while it was read", s->path);
    n -= got;
  }
  return VD_OK;
}

const char *vd_source_kind(const vd_source_file *source) {
  return source->kind;
}

double vd_source_fraction(const vd_source_file *s) {
  if (s->size <= 0) return 1;
  return (double)(s->archive ? archive_filter_bytes(s->archive, -1) : s->at) / (double)s->size;
}

void vd_source_close(vd_source_file *s) {
  if (!s) return;
  if (s->archive) archive_read_free(s->archive);
  if (s->fd >= 0) close(s->fd);
  free(s->waste);
  free(s->path);
  free(s);
}
