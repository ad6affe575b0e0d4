/* The streams of a file, the model that predicts them, and the coder between.
 *
 * Stream s of a file of n bytes is bytes floor(s n / n_stream) to floor((s + 1) n / n_stream). All streams advance
 * together: a step predicts one byte of each, then takes it. `group` streams are computed at once and ranks have whole
 * groups, the last one filled up with streams of zeros: the shapes, and so the bits, are the same on any number of
 * ranks. The first byte of a stream has equal probabilities; memories are as at the start of an evaluation. */
#ifndef VD_COMPRESSOR_H
#define VD_COMPRESSOR_H

#include "src/comm/context.h"
#include "src/compress/packed_file.h"
#include "src/model/model.h"

typedef struct vd_compress_plan {
  vd_context *ctx;
  vd_ops *ops;
  const vd_model_config *config;
  const uint8_t *symbol; /* [config->vocab] the byte that each id stands for, all different */
  int64_t n_byte, n_stream, group;
  const char *path; /* of the checkpoint, for messages */
  /* Collective(ctx->comm). Called on all ranks now and then with the bytes that are done; NULL: nobody. */
  void (*progress)(void *receiver, int64_t done);
  void *receiver;
} vd_compress_plan;

typedef struct vd_compressor vd_compressor;

/* Collective(ctx->comm). A model without training for the streams of this rank; plan is copied, what it points to
 * borrowed. The caller fills its parameters. The error is agreed. */
int vd_compressor_create(vd_compressor **out, const vd_compress_plan *plan, vd_error *err);
/* Not collective. NULL is allowed. */
void vd_compressor_destroy(vd_compressor *c);
/* Not collective. The compressor's model. Borrowed. */
vd_model *vd_compressor_model(vd_compressor *c);
/* Collective(ctx->comm). Codes `bytes` [n_byte] (rank 0; borrowed) into length, code and n_code of *p (rank 0; the
 * caller frees). A signal on any rank ends it: 128 + its number. VD_FAILED where logits are not finite. The error is
 * agreed. */
int vd_compressor_encode(vd_compressor *c, const uint8_t *bytes, vd_packed *p, vd_error *err);
/* Collective(ctx->comm). The reverse: the codes of *p (rank 0) into bytes [n_byte] (rank 0). Whether they are the right
 * ones the caller's digest says. Errors as above. */
int vd_compressor_decode(vd_compressor *c, const vd_packed *p, uint8_t *bytes, vd_error *err);

#endif
