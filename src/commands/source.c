#include "src/commands/source.h"

#include "src/base/regular_file.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

/* ---- what a file is packed with, by its first bytes ---- */

enum { HEAD = 512 /* bytes that tell the kind */ };

enum packing {
  PACKING_NONE,
  PACKING_GZIP,
  PACKING_ZIP,    /* one member */
  PACKING_FILTER, /* a stream that libarchive unpacks: bzip2, xz, lzma, zstd, lz4 */
  PACKING_REFUSED /* archives of several files, and packings that are not read */
};

typedef struct source_kind {
  const char *name; /* "plain", "gzip", "zip", "tar" ...: static */
  enum packing packing;
} source_kind;

static const struct magic {
  const char *name;
  enum packing packing;
  size_t n;
  const char *bytes;
} magics[] = {
    {"gzip", PACKING_GZIP, 2, "\x1f\x8b"},
    {"zip", PACKING_ZIP, 4, "PK\3\4"},
    {"zip", PACKING_ZIP, 4, "PK\5\6"}, /* without a member */
    {"xz", PACKING_FILTER, 6, "\xfd\x37zXZ\0"},
    {"zstd", PACKING_FILTER, 4, "\x28\xb5\x2f\xfd"},
    {"lz4", PACKING_FILTER, 4, "\x04\x22\x4d\x18"},
    {"bzip2", PACKING_FILTER, 0, NULL}, /* see is_bzip2() */
    {"lzma", PACKING_FILTER, 0, NULL},  /* see is_lzma() */
    {"lz4 (of an old format)", PACKING_REFUSED, 4, "\x02\x21\x4c\x18"},
    {"zip (of several parts)", PACKING_REFUSED, 4, "PK\7\10"},
    {"compress (.Z)", PACKING_REFUSED, 2, "\x1f\x9d"},
    {"7z", PACKING_REFUSED, 6, "7z\xbc\xaf\x27\x1c"},
    {"rar", PACKING_REFUSED, 6, "Rar!\x1a\7"},
    {"lzip", PACKING_REFUSED, 4, "LZIP"},
    {"lzop", PACKING_REFUSED, 5, "\x89LZO\0"},
    {"lrzip", PACKING_REFUSED, 4, "LRZI"},
    {"cabinet", PACKING_REFUSED, 8, "MSCF\0\0\0\0"},
    {"xar", PACKING_REFUSED, 5, "xar!\0"},
    {"rpm", PACKING_REFUSED, 4, "\xed\xab\xee\xdb"},
    {"snappy", PACKING_REFUSED, 10, "\xff\6\0\0sNaPpY"},
    {"cpio", PACKING_REFUSED, 6, "070701"},
    {"cpio", PACKING_REFUSED, 6, "070707"},
    {"ar", PACKING_REFUSED, 8, "!<arch>\n"},
};

static bool is_bzip2(const uint8_t *head, size_t n) {
  return n >= 10 && memcmp(head, "BZh", 3) == 0 && head[3] >= '1' && head[3] <= '9' &&
         (memcmp(head + 4, "\x31\x41\x59\x26\x53\x59", 6) == 0 || memcmp(head + 4, "\x17\x72\x45\x38\x50\x90", 6) == 0);
}

/* The format has no magic number: the usual properties, a dictionary of 2^i or 2^i + 2^(i-1) bytes, a possible size. */
static bool is_lzma(const uint8_t *head, size_t n) {
  if (n < 13 || head[0] != 0x5d) return false;
  uint32_t dictionary = 0;
  for (int i = 0; i < 4; i++) dictionary |= (uint32_t)head[1 + i] << 8 * i;
  uint64_t size = 0;
  for (int i = 0; i < 8; i++) size |= (uint64_t)head[5 + i] << 8 * i;
  uint32_t low = dictionary & (~dictionary + 1), rest = dictionary ^ low;
  bool is_power = low >= 4096 && (rest == 0 || rest == low << 1 || dictionary == UINT32_MAX);
  return is_power && (size == UINT64_MAX || size < (uint64_t)1 << 38);
}

/* Any tar: the checksum of the first header. */
static bool is_tar(const uint8_t *head, size_t n) {
  if (n < 512 || head[0] == '\0') return false;
  char field[9] = "";
  memcpy(field, head + 148, 8);
  char *end;
  long wanted = strtol(field, &end, 8), sum = 0;
  for (size_t i = 0; i < 512; i++) sum += i >= 148 && i < 156 ? ' ' : head[i];
  return end != field && sum == wanted;
}

/* The kind of a file that begins with head [n]. */
static source_kind kind_of(const uint8_t *head, size_t n) {
  for (size_t i = 0; i < sizeof magics / sizeof *magics; i++) {
    const struct magic *m = &magics[i];
    bool found = m->n > 0                        ? n >= m->n && memcmp(head, m->bytes, m->n) == 0
                 : strcmp(m->name, "bzip2") == 0 ? is_bzip2(head, n)
                                                 : is_lzma(head, n);
    if (found) return (source_kind){m->name, m->packing};
  }
  /* Frames 0x50 to 0x5f, which hold what the packer's user wants. */
  if (n >= 4 && head[0] >> 4 == 5 && memcmp(head + 1, "\x2a\x4d\x18", 3) == 0)
    return (source_kind){"zstd or lz4 (a skippable frame)", PACKING_REFUSED};
  if (is_tar(head, n)) return (source_kind){"tar", PACKING_REFUSED};
  return (source_kind){"plain", PACKING_NONE};
}

/* ---- reading ---- */

enum { BUFFER = 1 << 20 };

struct vd_source_file {
  char *path;
  source_kind kind;
  int fd;
  int64_t size, at; /* of the file on disk; bytes of it read (plain, gzip) */

  struct archive *archive; /* of all packings but gzip */

  z_stream gzip;
  bool gzip_is_open, in_member;
  uint8_t *packed; /* [BUFFER] of gzip */

  uint8_t head[HEAD]; /* of the unpacked bytes: read ahead to tell what they are */
  size_t head_n, head_at;
  uint8_t *waste; /* [BUFFER], for skipping */
};

static int damaged(const vd_source_file *s, const char *reason, vd_error *err) {
  return vd_fail(err, VD_FAILED, "cannot read %s (%s): %s", s->path, s->kind.name, reason);
}

static int archive_damaged(const vd_source_file *s, vd_error *err) {
  const char *reason = archive_error_string(s->archive);
  return damaged(s, reason ? reason : "it is damaged", err);
}

static int read_file(vd_source_file *s, uint8_t *to, int64_t size, int64_t *n, vd_error *err) {
  ssize_t got;
  do got = pread(s->fd, to, (size_t)size, s->at);
  while (got < 0 && errno == EINTR);
  if (got < 0) return vd_fail(err, VD_FAILED, "cannot read %s: %s", s->path, strerror(errno));
  s->at += got;
  *n = got;
  return VD_OK;
}

/* gzip is unpacked with zlib itself, which compares the checksum and the length of each member; libarchive does not. */
static int open_gzip(vd_source_file *s, vd_error *err) {
  enum { GZIP_ONLY = 16 + MAX_WBITS };
  s->gzip_is_open = inflateInit2(&s->gzip, GZIP_ONLY) == Z_OK;
  if (!s->gzip_is_open) return vd_fail(err, VD_FAILED, "cannot start zlib");
  s->packed = vd_calloc(BUFFER, 1);
  s->in_member = true;
  return VD_OK;
}

/* Fills the input where it is used up; none is left at the end of the file. */
static int fill_gzip(vd_source_file *s, vd_error *err) {
  int64_t n = 0;
  if (s->gzip.avail_in > 0) return VD_OK;
  if (read_file(s, s->packed, BUFFER, &n, err)) return err->status;
  s->gzip.next_in = s->packed;
  s->gzip.avail_in = (uInt)n;
  return VD_OK;
}

/* Between members: the next one, the end of the file, or zeros up to it (tapes pad with them); nothing else. */
static int begin_member(vd_source_file *s, vd_error *err) {
  if (fill_gzip(s, err) || s->gzip.avail_in == 0) return err->status;
  if (*s->gzip.next_in == 0) {
    while (s->gzip.avail_in > 0) {
      for (; s->gzip.avail_in > 0; s->gzip.avail_in--)
        if (*s->gzip.next_in++ != 0) return damaged(s, "there is something else behind its last member", err);
      if (fill_gzip(s, err)) return err->status;
    }
    return VD_OK;
  }
  if (*s->gzip.next_in != 0x1f) return damaged(s, "there is something else behind a member", err);
  s->in_member = inflateReset(&s->gzip) == Z_OK;
  return s->in_member ? VD_OK : damaged(s, "zlib failed", err);
}

static int read_gzip(vd_source_file *s, uint8_t *to, int64_t size, int64_t *n, vd_error *err) {
  s->gzip.next_out = to;
  s->gzip.avail_out = (uInt)(size < BUFFER ? size : BUFFER);
  uInt capacity = s->gzip.avail_out;
  while (s->gzip.avail_out == capacity) {
    if (!s->in_member && (begin_member(s, err) || !s->in_member)) break; /* at the end */
    if (fill_gzip(s, err)) break;
    if (s->gzip.avail_in == 0) return damaged(s, "it is truncated", err);
    int status = inflate(&s->gzip, Z_NO_FLUSH);
    if (status == Z_STREAM_END)
      s->in_member = false;
    else if (status != Z_OK && status != Z_BUF_ERROR)
      return damaged(s, s->gzip.msg ? s->gzip.msg : "it is damaged", err);
  }
  *n = capacity - s->gzip.avail_out;
  return err->status;
}

/* The next regular file of a zip; ARCHIVE_EOF when there is none. A name that this locale cannot write is no error. */
static int next_file(struct archive *a) {
  struct archive_entry *entry;
  int status;
  do {
    status = archive_read_next_header(a, &entry);
    if (status == ARCHIVE_WARN) status = ARCHIVE_OK;
  } while (status == ARCHIVE_OK && archive_entry_filetype(entry) == AE_IFDIR);
  return status;
}

static int choose_filter(vd_source_file *s) {
  static const struct {
    const char *name;
    int (*choose)(struct archive *);
  } filters[] = {{"bzip2", archive_read_support_filter_bzip2},
                 {"xz", archive_read_support_filter_xz},
                 {"lzma", archive_read_support_filter_lzma},
                 {"zstd", archive_read_support_filter_zstd},
                 {"lz4", archive_read_support_filter_lz4}};
  for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
    if (strcmp(filters[i].name, s->kind.name) == 0) return filters[i].choose(s->archive);
  return ARCHIVE_FATAL;
}

/* A zip ends with a record that says where its directory is; libarchive reads members without it, and of two zips in a
 * row one. Nothing may be behind the record, and the directory stands right before it. */
static int check_zip_end(const vd_source_file *s, vd_error *err) {
  enum { RECORD = 22, RECORDS_64 = 76, MOST = RECORD + 65535 };
  int64_t n = s->size < MOST ? s->size : MOST, start = s->size - n;
  uint8_t *tail = vd_calloc((size_t)n, 1);
  bool is_read = pread(s->fd, tail, (size_t)n, start) == n, is_whole = false;
  for (int64_t i = n - RECORD; is_read && i >= 0 && !is_whole; i--) {
    const uint8_t *r = tail + i;
    if (memcmp(r, "PK\5\6", 4) != 0 || i + RECORD + (r[20] | r[21] << 8) != n) continue;
    int64_t end = 0;
    for (int k = 0; k < 4; k++) end += (int64_t)((uint64_t)(r[12 + k] + (uint64_t)r[16 + k]) << 8 * k);
    bool is_64 = memcmp(r + 16, "\xff\xff\xff\xff", 4) == 0;
    is_whole = is_64 || end == start + i || end == start + i - RECORDS_64;
  }
  free(tail);
  if (is_whole) return VD_OK;
  return damaged(s,
                 "its last record is missing or in the wrong place: it is truncated, or there is something else in "
                 "the file",
                 err);
}

static int open_archive(vd_source_file *s, vd_error *err) {
  s->archive = archive_read_new();
  if (!s->archive) return vd_fail(err, VD_FAILED, "cannot start libarchive");
  if (s->kind.packing == PACKING_ZIP) {
    if (check_zip_end(s, err)) return err->status;
    archive_read_support_format_zip(s->archive);
  } else {
    archive_read_support_format_raw(s->archive);
    /* A warning says that libarchive would start another program for it. */
    if (choose_filter(s) != ARCHIVE_OK)
      return damaged(s, "the libarchive of this program does not unpack this; unpack it first", err);
  }
  if (archive_read_open_fd(s->archive, s->fd, BUFFER) != ARCHIVE_OK) return archive_damaged(s, err);
  int status = next_file(s->archive);
  if (status == ARCHIVE_EOF) return vd_fail(err, VD_FAILED, "%s (%s) holds no file", s->path, s->kind.name);
  return status == ARCHIVE_OK ? VD_OK : archive_damaged(s, err);
}

static int read_archive(vd_source_file *s, uint8_t *to, int64_t size, int64_t *n, vd_error *err) {
  la_ssize_t got = archive_read_data(s->archive, to, (size_t)size);
  if (got < 0) return archive_damaged(s, err);
  *n = got;
  if (got > 0) return VD_OK;
  if (s->kind.packing != PACKING_ZIP) {
    if (archive_filter_bytes(s->archive, -1) < s->size)
      return damaged(s, "there is something else behind its end", err);
    return VD_OK;
  }
  int status = next_file(s->archive);
  if (status == ARCHIVE_OK) return vd_fail(err, VD_FAILED, "%s (zip) holds more than one file", s->path);
  return status == ARCHIVE_EOF ? VD_OK : archive_damaged(s, err);
}

static int read_unpacked(vd_source_file *s, uint8_t *to, int64_t size, int64_t *n, vd_error *err) {
  *n = 0;
  if (s->archive) return read_archive(s, to, size, n, err);
  return s->gzip_is_open ? read_gzip(s, to, size, n, err) : read_file(s, to, size, n, err);
}

static int refuse(const vd_source_file *s, const char *where, const char *kind, vd_error *err) {
  return vd_fail(err, VD_FAILED, "%s %s %s file, which is not read: unpack it first", s->path, where, kind);
}

/* Packed bytes within packed bytes (.tar.gz) would make a corpus of noise. */
static int check_unpacked(vd_source_file *s, vd_error *err) {
  for (int64_t n = 1; n > 0 && s->head_n < sizeof s->head; s->head_n += (size_t)n)
    if (read_unpacked(s, s->head + s->head_n, (int64_t)(sizeof s->head - s->head_n), &n, err)) return err->status;
  source_kind within = kind_of(s->head, s->head_n);
  if (within.packing == PACKING_NONE) return VD_OK;
  char where[64];
  snprintf(where, sizeof where, "is a %s file that holds a", s->kind.name);
  return refuse(s, where, within.name, err);
}

static int open_kind(vd_source_file *s, vd_error *err) {
  uint8_t head[HEAD];
  ssize_t n = pread(s->fd, head, sizeof head, 0);
  if (n < 0) return vd_fail(err, VD_FAILED, "cannot read %s: %s", s->path, strerror(errno));
  s->kind = kind_of(head, (size_t)n);
  switch (s->kind.packing) {
  case PACKING_NONE:
    return VD_OK;
  case PACKING_REFUSED:
    return refuse(s, "is a", s->kind.name, err);
  case PACKING_GZIP:
    return open_gzip(s, err) ? err->status : check_unpacked(s, err);
  default:
    return open_archive(s, err) ? err->status : check_unpacked(s, err);
  }
}

int vd_source_open_plain(vd_source_file **source, const char *path, vd_error *err) {
  *source = NULL;
  vd_source_file *s = vd_calloc(1, sizeof *s);
  s->kind = (source_kind){.name = "plain", .packing = PACKING_NONE};
  s->path = vd_calloc(strlen(path) + 1, 1);
  memcpy(s->path, path, strlen(path));
  if (vd_open_regular(path, &s->fd, &s->size, err))
    vd_source_close(s);
  else
    *source = s;
  return err->status;
}

int vd_source_open(vd_source_file **source, const char *path, vd_error *err) {
  if (vd_source_open_plain(source, path, err)) return err->status;
  if (open_kind(*source, err)) {
    vd_source_close(*source);
    *source = NULL;
  }
  return err->status;
}

int vd_source_read(vd_source_file *s, uint8_t *to, int64_t size, int64_t *n, vd_error *err) {
  size_t ahead = s->head_n - s->head_at;
  if (ahead == 0) return read_unpacked(s, to, size, n, err);
  if ((int64_t)ahead > size) ahead = (size_t)size;
  memcpy(to, s->head + s->head_at, ahead);
  s->head_at += ahead;
  *n = (int64_t)ahead;
  return VD_OK;
}

int vd_source_skip(vd_source_file *s, int64_t n, vd_error *err) {
  if (s->kind.packing == PACKING_NONE && s->size - s->at >= n) {
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

const char *vd_source_packing(const vd_source_file *source) {
  return source->kind.name;
}

double vd_source_fraction(const vd_source_file *s) {
  if (s->size <= 0) return 1;
  return (double)(s->archive ? archive_filter_bytes(s->archive, -1) : s->at) / (double)s->size;
}

void vd_source_close(vd_source_file *s) {
  if (!s) return;
  if (s->archive) archive_read_free(s->archive);
  if (s->gzip_is_open) inflateEnd(&s->gzip);
  if (s->fd >= 0) close(s->fd);
  free(s->packed);
  free(s->waste);
  free(s->path);
  free(s);
}
