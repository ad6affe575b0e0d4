/* What a source file is packed with, told by its first bytes. */
#ifndef VD_SOURCE_KIND_H
#define VD_SOURCE_KIND_H

#include <stddef.h>
#include <stdint.h>

enum { VD_SOURCE_HEAD = 512 /* bytes that tell the kind */ };

enum vd_packing {
  VD_PACKING_NONE,
  VD_PACKING_GZIP,
  VD_PACKING_ZIP,    /* one member */
  VD_PACKING_FILTER, /* a stream that libarchive unpacks: bzip2, xz, lzma, zstd, lz4 */
  VD_PACKING_REFUSED /* archives of several files, and packings that are not read */
};

typedef struct vd_source_kind {
  const char *name; /* "plain", "gzip", "zip", "tar" ...: static */
  enum vd_packing packing;
} vd_source_kind;

/* Not collective. The kind of a file that begins with head [n]. */
vd_source_kind vd_source_kind_of(const uint8_t *head, size_t n);

#endif
