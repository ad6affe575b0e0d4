/* The place of a corpus on disk: may `viaduct prepare` write there, and is it the only one to do so? */
#ifndef VD_PREPARE_PLACE_H
#define VD_PREPARE_PLACE_H

#include "io/corpus_write.h"
#include "src/deck/settings.h"

/* Not collective. Before anything is read: data%path ends in NAME.h5, its folder can be written or made, its files have
 * names and paths that are not too long, none of them is a source or the deck, and what is there is a corpus or
 * nothing. VD_USAGE or VD_FAILED naming what is wrong. */
int vd_prepare_place_check(vd_h5 *h5, const vd_settings *s, vd_error *err);

/* Not collective. Makes the folder of `path`, which is data%path, and those above it; *made is how many were missing.
 */
int vd_prepare_place_make(const char *path, int *made, vd_error *err);
/* Not collective. Removes as many again, from the folder of `path` upwards, as far as they are empty: for a command
 * that fails before it has written anything. */
void vd_prepare_place_unmake(const char *path, int made);

/* Not collective. Before anything is removed: VD_USAGE when a shard that the plan writes would replace a file that is
 * not of the corpus at plan->path nor of the plan, or when another corpus in the folder uses these shards. Prints a
 * line for each file that is named like a shard of plan->path, belongs to neither, and is left alone. */
int vd_prepare_place_shards(vd_h5 *h5, const vd_corpus_plan *plan, vd_error *err);

/* Not collective. The corpus id of what is at `path` into id [64]; "" when that is no corpus. */
void vd_prepare_place_id(vd_h5 *h5, const char *path, char id[64]);

/* The right to write a corpus: a lock on .NAME.h5.lock beside it. */
typedef struct vd_prepare_lock {
  int fd; /* -1: not taken */
  char path[1100];
} vd_prepare_lock;

/* Not collective. Takes the lock for data%path = `path`, whose folder exists. VD_FAILED naming the process that holds
 * it. Prints a line where the file system has no locks. */
int vd_prepare_lock_take(vd_prepare_lock *lock, const char *path, vd_error *err);
/* Not collective. Removes the lock file and gives the lock back; harmless when it is not taken. */
void vd_prepare_lock_release(vd_prepare_lock *lock);

#endif
