/* The folder of a run: its lock, since two runs would replace each other's log and trace and remove each other's
 * checkpoints; and the check that no file which a run writes is one that it reads. */
#ifndef VD_RUN_FOLDER_H
#define VD_RUN_FOLDER_H

#include "io/corpus.h"
#include "src/base/path_identity.h"
#include "src/deck/settings.h"

#include <stdbool.h>

/* An advisory lock on DIRECTORY/.lock, which goes with the process however that ends. The file stays; it holds host and
 * process number of its last owner. */
typedef struct vd_run_lock vd_run_lock;

/* Not collective. One rank of a run calls it. Takes the lock of `directory` (which exists) into *lock, NULL at first; a
 * lock that is in *lock already stays. create: the file is made where it is missing, and names this process. Else
 * nothing is written, and *lock stays NULL where there is no such file: then no run is at work there. Waits some
 * seconds for a run that is just ending. VD_FAILED: another process holds it (named, with folder and host), or the file
 * cannot be opened. A file system without locks is no error, see vd_run_lock_notice(). The caller ends with
 * vd_run_lock_release(). */
int vd_run_lock_take(vd_run_lock **lock, const char *directory, bool create, vd_error *err);

/* Not collective. What could not be had (no locks here), or ""; borrowed. NULL is allowed. */
const char *vd_run_lock_notice(const vd_run_lock *lock);

/* Not collective. Removes the temporaries of deck.nml, log.jsonl and trace.h5 that killed runs left in the folder.
 * Does nothing without the lock, when they may be another run's. VD_FAILED naming what cannot be removed. */
int vd_run_lock_sweep(const vd_run_lock *lock, vd_error *err);

/* Not collective. Gives the lock back, frees, sets *lock to NULL. NULL is allowed. */
void vd_run_lock_release(vd_run_lock **lock);

/* Not collective. Adds what every command reads that opens a corpus: the deck, data%path and its shards. corpus NULL:
 * the command opens none, and what the deck names at data%path, if anything, is protected all the same. */
void vd_run_paths_inputs(vd_path_list *list, const vd_settings *s, const vd_corpus *corpus);

/* Not collective. Adds as inputs what a command that reads `checkpoint` must not overwrite, although it does not read
 * all of it: the checkpoint, those beside it, and the files of run%directory. */
void vd_run_paths_protect(vd_path_list *list, const vd_settings *s, const char *checkpoint);

/* Not collective. On rank 0. Compares all files that training writes (run%directory's, device%timeline) with all that
 * it reads and with each other. checkpoint: the one to resume from, or "". echo: the text of deck.nml; a deck that is
 * this very file with this very text is no conflict. VD_USAGE naming both paths, or a run%directory whose checkpoints
 * would have too long a path. */
int vd_run_paths_check(const vd_settings *s, const vd_corpus *corpus, const char *checkpoint, const char *echo,
                       vd_error *err);

#endif
