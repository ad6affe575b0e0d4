/* Chooses the checkpoint that a run resumes from, and compares its settings with the deck's. */
#ifndef VD_RESUME_H
#define VD_RESUME_H

#include "src/comm/context.h"
#include "src/deck/settings.h"

typedef struct vd_resume {
  char path[VD_PATH]; /* the checkpoint; "": a fresh start */
  int64_t update;     /* updates done in it */
  int64_t newest;     /* of run%directory when it was looked at, see vd_resume_newest() (rank 0) */
  char notice[4096];  /* lines for people: damaged checkpoints, settings that changed */
} vd_resume;

/* Collective(ctx->comm). Decides by run%resume. 'auto': the newest checkpoint of run%directory that verifies, or a
 * fresh start when there is none. 'never': VD_USAGE when the folder holds checkpoints. A path: that one; VD_USAGE when
 * run%directory holds newer ones, which would be overwritten. Then the checkpoint's settings are compared with the
 * deck's: VD_USAGE naming variable and both values where they may not differ, a notice where they may and it matters.
 * corpus_id: of data%path, must be the checkpoint's. Reads only. The error is agreed. */
int vd_resume_find(vd_context *ctx, const vd_settings *s, const char *corpus_id, vd_resume *r, vd_error *err);

/* Not collective. The newest update that DIRECTORY/checkpoints holds a checkpoint of, damaged or not; -1: none. */
int64_t vd_resume_newest(const char *directory);

#endif
