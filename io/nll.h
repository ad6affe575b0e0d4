/* Files of kind "nll": /nll [token], what each token of a split cost a model. */
#ifndef VD_NLL_H
#define VD_NLL_H

#include "io/h5.h"

typedef struct vd_nll vd_nll;

/* What the values are of: attributes of the root. Borrowed. */
typedef struct vd_nll_source {
  const char *checkpoint;     /* absolute path of the file, links resolved */
  const char *sha256;         /* the digest at its end; attribute checkpoint_sha256 */
  const char *model_settings; /* its settings, as the model was used */
  const char *split, *corpus_id;
  int64_t update; /* of the checkpoint; attribute checkpoint_update */
} vd_nll_source;

/* Not collective. Begins the file `path` for n_token tokens, whole or not at all. Ends with vd_nll_commit or
 * vd_nll_abandon. VD_FAILED when it cannot be written. */
int vd_nll_begin(vd_nll **f, vd_h5 *h5, const char *path, int64_t n_token, const vd_nll_source *source,
                 const vd_origin *origin, vd_error *err);
/* Not collective. Writes nll [n] (nats; NaN: not predicted) of the tokens first .. first + n - 1. */
int vd_nll_put(vd_nll *f, int64_t first, int64_t n, const float *nll, vd_error *err);
/* Not collective. Puts the file in its place, frees and sets *f to NULL, also on error. */
int vd_nll_commit(vd_nll **f, vd_error *err);
/* Not collective. Removes what was written, frees and sets *f to NULL; NULL is allowed. */
void vd_nll_abandon(vd_nll **f);

#endif
