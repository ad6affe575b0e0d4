/* What `viaduct eval` writes besides its line: files of kind "nll", what each token of a split cost a model, and of
 * kind "attention", how its heads attended (doc/FILES.md). */
#ifndef VD_EVAL_FILE_H
#define VD_EVAL_FILE_H

#include "io/corpus_layout.h"
#include "io/h5.h"

typedef struct vd_nll vd_nll;
typedef struct vd_attention_file vd_attention_file;

/* Checkpoint and split that the values belong to: attributes of the root. Borrowed. */
typedef struct vd_eval_source {
  const char *checkpoint;     /* absolute path of the file, links resolved */
  const char *sha256;         /* the digest at its end; attribute checkpoint_sha256 */
  const char *model_settings; /* its settings, as the model was used */
  const char *split, *corpus_id;
  int64_t update; /* of the checkpoint; attribute checkpoint_update */
} vd_eval_source;

/* Not collective. Begins the file `path` for n_token tokens, whole or not at all. Ends with vd_nll_commit or
 * vd_nll_abandon. VD_FAILED when it cannot be written. */
int vd_nll_begin(vd_nll **f, vd_h5 *h5, const char *path, int64_t n_token, const vd_eval_source *source,
                 const vd_origin *origin, vd_error *err);
/* Not collective. Writes nll [n] (nats; NaN: not predicted) of the tokens first .. first + n - 1. */
int vd_nll_put(vd_nll *f, int64_t first, int64_t n, const float *nll, vd_error *err);
/* Not collective. Puts the file in its place, frees and sets *f to NULL, also on error. */
int vd_nll_commit(vd_nll **f, vd_error *err);
/* Not collective. Removes what was written, frees and sets *f to NULL; NULL is allowed. */
void vd_nll_abandon(vd_nll **f);

/* What an attention file holds but for the weights. Borrowed. */
typedef struct vd_attention_contents {
  int64_t n_layer, n_head, n_distance, n_position; /* n_position 0: no datasets of positions */
  const float *span;                               /* [n_layer][n_head] tokens */
  const int64_t *position;                         /* [n_position] ascending; tokens of the split */
  const int32_t *token;                            /* [n_position] their ids */
  const float *nll;                                /* [n_position] nats */
  const int32_t *context;          /* [n_position][n_distance] ids of the tokens attended to; -1: none */
  const vd_vocabulary *vocabulary; /* of the ids */
} vd_attention_contents;

/* Not collective. Begins the file `path`, whole or not at all, and writes all but the weights. Every layer and position
 * is then put once. Ends with vd_attention_file_commit or vd_attention_file_abandon. VD_FAILED when it cannot be
 * written. */
int vd_attention_file_begin(vd_attention_file **file, vd_h5 *h5, const char *path, const vd_attention_contents *a,
                            const vd_eval_source *source, const vd_origin *origin, vd_error *err);
/* Not collective. The mean weights of a layer, mean [n_head][n_distance]. */
int vd_attention_file_put_mean(vd_attention_file *f, int64_t layer, const double *mean, vd_error *err);
/* Not collective. The weights of position k in a layer, weight [n_head][n_distance]. */
int vd_attention_file_put_position(vd_attention_file *f, int64_t k, int64_t layer, const float *weight, vd_error *err);
/* Not collective. Puts the file in its place, frees and sets *f to NULL, also on error. */
int vd_attention_file_commit(vd_attention_file **f, vd_error *err);
/* Not collective. Removes what was written, frees and sets *f to NULL; NULL is allowed. */
void vd_attention_file_abandon(vd_attention_file **f);

#endif
