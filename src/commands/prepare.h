/* The parts of `viaduct prepare`: what one rank learns of the sources, and the shards that each rank writes. */
#ifndef VD_PREPARE_H
#define VD_PREPARE_H

#include "io/corpus_write.h"
#include "src/comm/context.h"
#include "src/deck/settings.h"

#include <time.h>

/* How far a long task is, for people: one live line where standard output is a terminal, else a line now and then. */
typedef struct vd_progress {
  const char *what; /* NULL: say nothing */
  bool is_live, said;
  double last;
} vd_progress;

/* Not collective. Starts; what == NULL says nothing ever. */
void vd_progress_start(vd_progress *p, const char *what);
/* Not collective. Tells the fraction done (0..1), but not too often. */
void vd_progress_show(vd_progress *p, double fraction);
/* Not collective. Clears the live line. */
void vd_progress_end(vd_progress *p);

/* The files of a source as they were when it was scanned, to see that they have not changed since: the source itself,
 * and where it is a binary file of fairseq's the index and the dictionary beside it. */
enum { VD_SOURCE_FILES = 3 };
typedef struct vd_prepare_stamp {
  struct {
    int64_t size;
    struct timespec changed;
  } file[VD_SOURCE_FILES];
} vd_prepare_stamp;

/* Not collective. Points plan->source at the paths of the settings: one, or where plan->n_source > 1 the three texts.
 */
void vd_prepare_name_sources(const vd_settings *s, vd_corpus_plan *plan);
/* Not collective. Names the sources of the settings in the plan and opens and closes each: VD_FAILED for one that is
 * missing or that cannot be unpacked. stamp: as the files are now. */
int vd_prepare_sources(const vd_settings *s, vd_corpus_plan *plan, vd_prepare_stamp stamp[VD_N_SPLIT], vd_error *err);
/* Not collective. Reads all sources once and fills the plan: sizes, md5, vocabulary (its arrays are freed with
 * vd_prepare_free()), lengths of the splits, identity; kind [3]: how each file is packed. VD_USAGE: a source that is
 * shorter than the splits ask for, or empty; VD_FAILED: a file that cannot be read. */
int vd_prepare_scan(vd_corpus_plan *plan, const vd_settings *s, vd_h5 *h5, const char *kind[VD_N_SPLIT], vd_error *err);
/* Not collective. VD_FAILED, with the file's name, when a file of a source is not what it was when it was scanned. */
int vd_prepare_unchanged(const vd_corpus_plan *plan, const vd_prepare_stamp stamp[VD_N_SPLIT], vd_error *err);
/* Not collective. Frees the arrays of the vocabulary. */
void vd_prepare_free(vd_corpus_plan *plan);

/* Not collective. Writes those shards whose number, counted over all splits, is `rank` modulo `size`; reads the sources
 * up to the last of them, in about 8 MiB of memory, beside two threads that write. Errors: sources that cannot be read
 * or have changed, a full disk.
 */
int vd_prepare_shards(vd_h5 *h5, const vd_corpus_plan *plan, int rank, int size, vd_error *err);

#endif
