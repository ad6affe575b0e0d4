/* The file that `viaduct compress` writes: a header, the codes of all streams, the seal of io/digest.h. The layout is
 * in doc/FILES.md, "Packed file". */
#ifndef VD_PACKED_FILE_H
#define VD_PACKED_FILE_H

#include "io/digest.h"
#include "src/compress/environment.h"

#include <stdbool.h>
#include <stdint.h>

/* Bytes of an original, and streams, at most: a file is held in memory. */
#define VD_PACKED_LONGEST ((int64_t)1 << 34)
enum { VD_PACKED_STREAMS = 65536, VD_PACKED_MEMORY = VD_ENVIRONMENT_TEXT };

typedef struct vd_packed {
  int64_t n_byte;                      /* of the original */
  uint8_t sha256[VD_DIGEST_BYTES];     /* of the original */
  char checkpoint[VD_DIGEST_TEXT];     /* the digest at the end of the checkpoint, hexadecimal */
  int64_t update;                      /* of the checkpoint */
  uint8_t vocabulary[VD_DIGEST_BYTES]; /* SHA-256 of the bytes that the model's ids stand for, in their order */
  char memory[VD_PACKED_MEMORY];       /* &memory as used, a namelist; Transformer-XL, else "" */
  int64_t n_stream, group;             /* streams of the file, and of them computed at once */
  vd_environment environment;
  int64_t *length; /* [n_stream] bytes of each stream's code; owned */
  uint8_t *code;   /* [n_code] the codes, one after the other; owned */
  int64_t n_code;
} vd_packed;

/* Not collective. True where `path` is a regular file that begins as packed files do. */
bool vd_packed_is(const char *path);
/* Not collective. Writes the file at `path` whole or not at all. Errors: the disk's. */
int vd_packed_write(const vd_packed *p, const char *path, vd_error *err);
/* Not collective. Reads the file at `path` after its digest was found right. The caller ends with vd_packed_free(),
 * also on error. VD_FAILED naming the file: damaged, no packed file, or of a later format. */
int vd_packed_read(vd_packed *p, const char *path, vd_error *err);
/* Not collective. Bytes of the whole file. */
int64_t vd_packed_size(const vd_packed *p);
/* Not collective. Describes it on standard output, as `viaduct info` does. */
void vd_packed_print(const vd_packed *p, const char *path);
/* Not collective. Frees arrays. */
void vd_packed_free(vd_packed *p);

#endif
