/* The bytes of one source file: plain, or unpacked from gzip, bzip2, xz, lzma, zstd, lz4 or a zip of one file. They are
 * streamed, never held whole. */
#ifndef VD_SOURCE_H
#define VD_SOURCE_H

#include "src/base/error.h"

#include <stdint.h>

typedef struct vd_source_file vd_source_file;

/* Not collective. Opens the file; its first bytes, not its name, tell how it is packed. *source is freed with
 * vd_source_close(). VD_FAILED naming the file: missing, not a regular file (which is not opened), not readable,
 * damaged, a tar or another archive, packed twice, a zip of no or more than one file. */
int vd_source_open(vd_source_file **source, const char *path, vd_error *err);
/* Not collective. Opens the file as plain bytes whatever they look like. VD_FAILED naming the file: missing, not a
 * regular file, not readable. */
int vd_source_open_plain(vd_source_file **source, const char *path, vd_error *err);
/* Not collective. Reads up to `size` bytes into `to`; *n gets how many, 0 only at the end. VD_FAILED naming the file
 * when it cannot be read or is damaged. */
int vd_source_read(vd_source_file *source, uint8_t *to, int64_t size, int64_t *n, vd_error *err);
/* Not collective. Passes over n bytes: a seek where the file is plain, else they are decompressed and thrown away.
 * VD_FAILED when there are fewer. */
int vd_source_skip(vd_source_file *source, int64_t n, vd_error *err);
/* Not collective. How the file is packed: "plain", "gzip", "zip" ... Static storage. */
const char *vd_source_packing(const vd_source_file *source);
/* Not collective. How much of the file, as it lies on disk, is behind: 0..1. */
double vd_source_fraction(const vd_source_file *source);
/* Not collective. Closes and frees. NULL is allowed. */
void vd_source_close(vd_source_file *source);

#endif
