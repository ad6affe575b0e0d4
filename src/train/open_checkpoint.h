/* Opens the checkpoint that eval and generate use, and applies what their deck changes of its settings. */
#ifndef VD_OPEN_CHECKPOINT_H
#define VD_OPEN_CHECKPOINT_H

#include "src/train/configure.h"

typedef struct vd_open_checkpoint {
  char path[VD_PATH + 64]; /* of the file that last.h5 or best.h5 pointed to */
  int64_t update;
  char corpus_id[64];   /* of the data it was trained on */
  vd_settings settings; /* those it was trained with; after vd_open_checkpoint_override those in use */
  char notice[512];     /* a line for each variable that was overridden */
} vd_open_checkpoint;

/* Collective(ctx->comm). named: a checkpoint, or "": best.h5, else last.h5 of run%directory. Reads its
 * settings, corpus id and update. VD_FAILED when there is none. The error is agreed. */
int vd_open_checkpoint_find(vd_context *ctx, const vd_settings *s, const char *named, vd_open_checkpoint *r,
                            vd_error *err);

/* Not collective. What the deck sets of the model itself (&model, &span, &memory) against what the checkpoint was
 * trained with: &memory of Transformer-XL may differ and takes the place of the checkpoint's, noted in r->notice; what
 * only training uses is left alone; VD_USAGE with the place in the deck where anything else differs. */
int vd_open_checkpoint_override(const vd_settings *s, vd_open_checkpoint *r, vd_error *err);

/* Not collective. Every variable of &model and &span that gives a tensor its shape must be the checkpoint's: VD_USAGE
 * with both values where the deck's differs. */
int vd_open_checkpoint_shape(const vd_settings *s, const vd_open_checkpoint *r, vd_error *err);

/* Not collective. The model of the checkpoint, with the vocabulary of `corpus`: where that has another number of
 * symbols, reading the parameters fails and names both shapes. */
int vd_open_checkpoint_config(const vd_open_checkpoint *r, const vd_corpus *corpus, vd_model_config *config,
                              vd_error *err);

#endif
