/* Files that appear whole or not at all, after a crash too: written under a temporary name in the same folder
 * (.NAME.tmp-PID), synced, renamed over `path`, and the folder synced. All files that Viaduct writes go this way:
 * checkpoints, corpora, shards, nll and attention files, traces, logs, decks, generated text. */
#ifndef VD_ATOMIC_FILE_H
#define VD_ATOMIC_FILE_H

#include "src/base/error.h"

#include <stdbool.h>

/* A file that is being written. The caller writes to `temporary`, then commits or abandons. */
typedef struct vd_atomic_file {
  char path[1024], temporary[1088]; /* temporary: "" once the file is committed or abandoned */
} vd_atomic_file;

/* Not collective. Sets both names; creates nothing. VD_FAILED, and `temporary` is "", when the path is too long, its
 * folder is missing or not writable, or something other than a regular file or a symbolic link is there. */
int vd_atomic_begin(vd_atomic_file *f, const char *path, vd_error *err);
/* Not collective. Creates the temporary empty and opens it for writing; the caller closes *fd. flags: more flags of
 * open(), such as O_APPEND. VD_FAILED naming the file; *fd is -1 then. */
int vd_atomic_create(const vd_atomic_file *f, int flags, int *fd, vd_error *err);
/* Not collective. Syncs the temporary, renames it to `path`, syncs the folder. An open descriptor of the temporary
 * stays valid. On error removes the temporary and leaves what is at `path`. */
int vd_atomic_commit(vd_atomic_file *f, vd_error *err);
/* Not collective. As vd_atomic_commit() without the sync of the temporary, which may be a symbolic link. */
int vd_atomic_replace(vd_atomic_file *f, vd_error *err);
/* Not collective. Removes the temporary. Does nothing after a commit or a failed begin. */
void vd_atomic_abandon(vd_atomic_file *f);

/* Not collective. All of it at once: the file `path` holds text [n] bytes. */
int vd_atomic_write(const char *path, const char *text, size_t n, vd_error *err);

/* Not collective. Writes all of data [n] to fd, where write() may stop early. VD_FAILED naming `path`. */
int vd_write_all(int fd, const char *path, const char *data, size_t n, vd_error *err);

/* Not collective. True when `name` (without folder) is a temporary of the file `of` (NULL: of any file), of whatever
 * process. */
bool vd_is_temporary(const char *name, const char *of);

/* Not collective. Puts the folder of `path` into folder [size], "." where path names none; returns the name in it, a
 * part of `path`. */
const char *vd_split_path(const char *path, char *folder, size_t size);
/* Not collective. Makes the folder `path` and those above it that are missing, and syncs the entry of each new one.
 * VD_FAILED naming the folder that cannot be made, or that is something else. */
int vd_make_folder(const char *path, vd_error *err);
/* Not collective. Syncs the folder that holds `path`, so that new, renamed and removed names in it are durable. */
int vd_sync_folder(const char *path, vd_error *err);

#endif
