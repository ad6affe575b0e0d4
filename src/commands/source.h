/* The bytes of one source file: plain, or out of a .zip, .gz or .xz, streamed and never held whole. */
#ifndef VD_SOURCE_H
#define VD_SOURCE_H

#include "src/base/error.h"

#include <stdint.h>

typedef struct vd_source_file vd_source_file;

/* Not collective. Opens the file; what it is is told by its first bytes, not by its name. *source is freed with
 * vd_source_close(). VD_FAILED naming the file: missing, not readable, damaged, a zip of more than one file. */
int vd_source_open(vd_source_file **source, const char *path, vd_error *err);
/* Not collective. Reads up to `size` bytes into `to`; *n gets how many, 0 only at the end. VD_FAILED naming the file
 * when it cannot be read or is damaged. */
int vd_source_read(vd_source_file *source, uint8_t *to, int64_t size, int64_t *n, vd_error *err);
/* Not collective. Passes over n bytes: a seek where the file is plain, else they are decompressed and thrown away.
 * VD_FAILED when there are fewer. */
int vd_source_skip(vd_source_file *source, int64_t n, vd_error *err);
/* Not collective. "plain", "zip", "gzip" or "xz". Static storage. */
const char *vd_source_kind(const vd_source_file *source);
/* Not collective. How much of the file, as it lies on disk, is behind: 0..1. */
double vd_source_fraction(const vd_source_file *source);
/* Not collective. Closes and frees. NULL is allowed. */
void vd_source_close(vd_source_file *source);

#endif
