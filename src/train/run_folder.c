#include "src/train/run_folder.h"

#include "io/atomic_file.h"
#include "io/checkpoint.h"
#include "src/base/file_lock.h"
#include "src/base/regular_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The digits of a checkpoint's name are those of vd_checkpoint_path(). */
#define CHECKPOINT_PATTERN "[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].h5"

struct vd_run_lock {
  int fd;
  bool held; /* false: the file system has no locks */
  char directory[1024];
  char notice[1200];
};

/* Takes the lock of an open file. */
static int lock_file(vd_run_lock *l, vd_error *err) {
  char owner[VD_LOCK_OWNER];
  switch (vd_file_lock(l->fd, owner)) {
  case VD_LOCK_HELD:
    l->held = true;
    return VD_OK;
  case VD_LOCK_UNSUPPORTED:
    snprintf(l->notice, sizeof l->notice, "%s cannot be locked (%s): make sure that no other run uses this folder",
             l->directory, strerror(errno));
    return VD_OK;
  default:
    return vd_fail(
        err, VD_FAILED,
        "another run is at work in run%%directory %s (%s): wait for its end, or choose another run%%directory",
        l->directory, owner[0] ? owner : "it did not say which");
  }
}

int vd_run_lock_take(vd_run_lock **lock, const char *directory, bool create, vd_error *err) {
  if (!*lock) {
    char path[1100];
    snprintf(path, sizeof path, "%s/.lock", directory);
    int fd;
    if (vd_file_lock_open(path, create, &fd, err) || fd < 0) return err->status;
    vd_run_lock *made = vd_calloc(1, sizeof *made);
    made->fd = fd;
    snprintf(made->directory, sizeof made->directory, "%s", directory);
    if (lock_file(made, err)) {
      vd_run_lock_release(&made);
      return err->status;
    }
    *lock = made;
  }
  if (create) vd_file_lock_sign((*lock)->fd);
  return VD_OK;
}

const char *vd_run_lock_notice(const vd_run_lock *lock) {
  return lock ? lock->notice : "";
}

int vd_run_lock_sweep(const vd_run_lock *lock, vd_error *err) {
  static const char *const ours[] = {"deck.nml", "log.jsonl", "trace.h5"};
  if (!lock || !lock->held) return VD_OK;
  DIR *folder = opendir(lock->directory);
  if (!folder) return vd_fail(err, VD_FAILED, "cannot read the folder %s: %s", lock->directory, strerror(errno));
  for (const struct dirent *e; (e = readdir(folder)) != NULL;) {
    bool left = false;
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) left = left || vd_is_temporary(e->d_name, ours[i]);
    if (left && unlinkat(dirfd(folder), e->d_name, 0) != 0 && errno != ENOENT)
      vd_fail(err, VD_FAILED, "cannot remove %s/%s: %s", lock->directory, e->d_name, strerror(errno));
  }
  closedir(folder);
  return err->status;
}

void vd_run_lock_release(vd_run_lock **lock) {
  if (!*lock) return;
  close((*lock)->fd);
  free(*lock);
  *lock = NULL;
}

static void add_corpus(vd_path_list *list, const vd_settings *s, const vd_corpus *corpus) {
  static const char *const patterns[] = {"-train-[0-9]*.h5", "-valid-[0-9]*.h5", "-test-[0-9]*.h5"};
  char folder[VD_PATH], own[VD_PATH];
  const char *prefix = own, *place = s->data.path;
  if (!corpus && !place[0]) return;
  vd_corpus_prefix(place, own, sizeof own);
  if (corpus) place = vd_corpus_place(corpus, &prefix);
  vd_path_list_add(list, VD_PATH_INPUT, "data%path", s->data.path);
  vd_split_path(place, folder, sizeof folder);
  for (int i = 0; i < 3; i++)
    vd_path_list_add_pattern(list, VD_PATH_INPUT, "a shard of data%path", folder, prefix, patterns[i]);
}

void vd_run_paths_inputs(vd_path_list *list, const vd_settings *s, const vd_corpus *corpus) {
  vd_path_list_add(list, VD_PATH_INPUT, "the deck", s->origin);
  add_corpus(list, s, corpus);
}

void vd_run_paths_protect(vd_path_list *list, const vd_settings *s, const char *checkpoint) {
  static const char *const files[] = {"deck.nml", "log.jsonl", "trace.h5", ".lock"};
  char path[VD_PATH + 64], folder[VD_PATH + 64];
  vd_path_list_add(list, VD_PATH_INPUT, "the checkpoint", checkpoint);
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    snprintf(path, sizeof path, "%s/%s", s->run.directory, files[i]);
    vd_path_list_add(list, VD_PATH_INPUT, "a file of run%directory", path);
  }
  for (int i = 0; i < 2; i++) {
    if (i == 0)
      snprintf(folder, sizeof folder, "%s/checkpoints", s->run.directory);
    else
      vd_split_path(checkpoint, folder, sizeof folder);
    vd_path_list_add_pattern(list, VD_PATH_INPUT, "a checkpoint", folder, "update-", CHECKPOINT_PATTERN);
    vd_path_list_add_pattern(list, VD_PATH_INPUT, "a link to a checkpoint", folder, "last.h5", "");
    vd_path_list_add_pattern(list, VD_PATH_INPUT, "a link to a checkpoint", folder, "best.h5", "");
  }
}

/* True when the file at `path` holds this text and nothing else: writing the text again changes nothing. */
static bool holds(const char *path, const char *text) {
  size_t n = strlen(text);
  char *found = vd_calloc(n + 1, 1);
  int fd;
  vd_error none = {0};
  bool same = vd_open_regular(path, &fd, NULL, &none) == VD_OK;
  FILE *file = same ? fdopen(fd, "r") : NULL;
  same = file && fread(found, 1, n + 1, file) == n && memcmp(found, text, n) == 0;
  if (file) fclose(file);
  free(found);
  return same;
}

static void add_outputs(vd_path_list *list, const vd_settings *s) {
  static const char *const files[] = {"deck.nml", "log.jsonl", "trace.h5", ".lock"};
  static const char *const temporaries[] = {".deck.nml", ".log.jsonl", ".trace.h5"};
  static const char *const links[] = {"checkpoints/last.h5", "checkpoints/best.h5"};
  char path[VD_PATH + 64], folder[VD_PATH + 64];
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    snprintf(path, sizeof path, "%s/%s", s->run.directory, files[i]);
    vd_path_list_add(list, VD_PATH_OUTPUT, "a file of run%directory", path);
  }
  for (int i = 0; i < 3; i++)
    vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a temporary of run%directory", s->run.directory, temporaries[i],
                             ".tmp-[0-9]*");
  snprintf(folder, sizeof folder, "%s/checkpoints", s->run.directory);
  for (size_t i = 0; i < sizeof links / sizeof *links; i++)
    vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a link of run%directory", folder, strchr(links[i], '/') + 1, "");
  vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a checkpoint of run%directory", folder, "update-",
                           CHECKPOINT_PATTERN);
  vd_path_list_add(list, VD_PATH_OUTPUT, "device%timeline", s->device.timeline);
}

static int check_length(const vd_settings *s, vd_error *err) {
  vd_atomic_file f;
  char path[VD_PATH + 64];
  vd_checkpoint_path(s->run.directory, 0, path, sizeof path);
  if (strlen(path) < sizeof f.path) return VD_OK;
  return vd_fail(err, VD_USAGE, "run%%directory is too long by %zu bytes: the paths of its checkpoints do not fit",
                 strlen(path) + 1 - sizeof f.path);
}

int vd_run_paths_check(const vd_settings *s, const vd_corpus *corpus, const char *checkpoint, const char *echo,
                       vd_error *err) {
  char deck[VD_PATH + 64];
  if (check_length(s, err)) return err->status;
  snprintf(deck, sizeof deck, "%s/deck.nml", s->run.directory);
  vd_path_list *list = vd_path_list_create();
  bool unchanged = holds(deck, echo) && holds(s->origin, echo);
  if (unchanged)
    add_corpus(list, s, corpus);
  else
    vd_run_paths_inputs(list, s, corpus);
  vd_path_list_add(list, VD_PATH_RESUMED, "the checkpoint to resume from", checkpoint);
  vd_path_list_add(list, VD_PATH_RESUMED, "run%start_from", s->run.start_from);
  add_outputs(list, s);
  vd_path_list_check(list, err);
  vd_path_list_destroy(list);
  return err->status;
}
