#include "src/commands/prepare_place.h"

#include "io/digest.h"
#include "src/base/file_lock.h"
#include "src/base/machine.h"
#include "src/base/path_identity.h"
#include "src/commands/vocabulary.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Larger files are taken for no corpus: NAME.h5 holds a vocabulary and no tokens. */
static const int64_t LARGEST_CORPUS = (int64_t)256 << 20;

static int check_name(const char *path, vd_error *err) {
  char folder[VD_PATH], shard[VD_PATH + 64], prefix[VD_PATH];
  const char *name = vd_split_path(path, folder, sizeof folder);
  size_t n = strlen(name);
  if (n < 4 || strcmp(name + n - 3, ".h5") != 0)
    return vd_fail(err, VD_USAGE, "data%%path = '%s' must end in NAME.h5", path);
  if (name[0] == '.') return vd_fail(err, VD_USAGE, "data%%path = '%s': the name must not begin with a dot", path);
  vd_corpus_prefix(path, prefix, sizeof prefix);
  if (vd_shard_path(path, prefix, VD_SPLIT_TRAIN, 99999999, shard, sizeof shard, err)) return err->status;
  /* While a shard is written, its name is .NAME.tmp-PID. */
  size_t longest = strlen(strrchr(shard, '-') + 1) + strlen(prefix) +
                   strlen("-train-"
                          "..tmp-1234567");
  if (strlen(shard) >= sizeof((vd_atomic_file *)0)->path || longest > NAME_MAX)
    return vd_fail(err, VD_USAGE, "data%%path = '%s' is too long: the names of its shards do not fit", path);
  return VD_OK;
}

/* Can the folder of `path` be written, or be made? */
static int check_folder(const char *path, vd_error *err) {
  char wanted[VD_PATH], folder[VD_PATH];
  struct stat st;
  vd_split_path(path, wanted, sizeof wanted);
  vd_existing_folder(wanted, folder, sizeof folder);
  if (access(folder, W_OK | X_OK) != 0)
    return vd_fail(err, VD_FAILED, "cannot write %s: folder %s: %s", path, folder, strerror(errno));
  if (stat(folder, &st) != 0 || !S_ISDIR(st.st_mode))
    return vd_fail(err, VD_FAILED, "cannot write %s: %s is not a folder", path, folder);
  return VD_OK;
}

static void add_text(vd_path_list *list, const char *name, const char *path) {
  static const char *const others[] = {".idx", "dict.txt"};
  char beside[2 * VD_PATH], what[128];
  vd_path_list_add(list, VD_PATH_INPUT, name, path);
  for (int i = 0; i < 2 && vd_fairseq_is(path); i++) {
    vd_fairseq_beside(path, others[i], beside, sizeof beside);
    snprintf(what, sizeof what, "the %s of %s", others[i], name);
    vd_path_list_add(list, VD_PATH_INPUT, what, beside);
  }
}

/* No file that is written is one that is read. */
static int check_identity(const vd_settings *s, vd_error *err) {
  static const char *const patterns[] = {"-train-[0-9]*.h5", "-valid-[0-9]*.h5", "-test-[0-9]*.h5"};
  static const char *const temporary[] = {".h5.tmp-[0-9]*", "-train-[0-9]*.h5.tmp-[0-9]*",
                                          "-valid-[0-9]*.h5.tmp-[0-9]*", "-test-[0-9]*.h5.tmp-[0-9]*"};
  char folder[VD_PATH], prefix[VD_PATH], hidden[VD_PATH + 1], lock[2 * VD_PATH];
  const char *name = vd_split_path(s->data.path, folder, sizeof folder), *vocabulary = s->prepare.vocabulary;
  vd_corpus_prefix(s->data.path, prefix, sizeof prefix);
  snprintf(hidden, sizeof hidden, ".%s", prefix);
  snprintf(lock, sizeof lock, "%s/.%s.lock", folder, name);
  vd_path_list *list = vd_path_list_create();
  vd_path_list_add(list, VD_PATH_INPUT, "the deck", s->origin);
  vd_path_list_add(list, VD_PATH_INPUT, "prepare%source", s->prepare.source);
  add_text(list, "prepare%train_text", s->prepare.train_text);
  add_text(list, "prepare%valid_text", s->prepare.valid_text);
  add_text(list, "prepare%test_text", s->prepare.test_text);
  if (strcmp(vocabulary, "found") != 0 && strcmp(vocabulary, "bytes") != 0)
    vd_path_list_add(list, VD_PATH_INPUT, "prepare%vocabulary", vocabulary);
  vd_path_list_add(list, VD_PATH_OUTPUT, "data%path", s->data.path);
  vd_path_list_add(list, VD_PATH_OUTPUT, "the lock of data%path", lock);
  for (int i = 0; i < 3; i++)
    vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a shard of data%path", folder, prefix, patterns[i]);
  for (int i = 0; i < 4; i++)
    vd_path_list_add_pattern(list, VD_PATH_OUTPUT, "a temporary of data%path", folder, hidden, temporary[i]);
  vd_path_list_check(list, err);
  vd_path_list_destroy(list);
  return err->status;
}

/* What is at data%path already: only a corpus may ever be replaced. */
static int check_replaced(vd_h5 *h5, const char *path, vd_error *err) {
  struct stat st;
  hid_t file;
  vd_error why = {0};
  if (lstat(path, &st) != 0) return VD_OK;
  vd_h5_lock(h5);
  if (vd_h5_open(path, "corpus", &file, &why) == VD_OK) H5Fclose(file);
  vd_h5_unlock(h5);
  if (why.status)
    return vd_fail(err, VD_USAGE,
                   "%s exists already, but %s; prepare%%overwrite replaces nothing but a corpus: choose another "
                   "data%%path, or remove the file",
                   path, why.message);
  return VD_OK;
}

int vd_prepare_place_check(vd_h5 *h5, const vd_settings *s, vd_error *err) {
  if (check_name(s->data.path, err) || check_identity(s, err) || check_replaced(h5, s->data.path, err) ||
      check_folder(s->data.path, err))
    return err->status;
  return VD_OK;
}

int vd_prepare_place_make(const char *path, int *made, vd_error *err) {
  char folder[VD_PATH], above[VD_PATH];
  vd_split_path(path, folder, sizeof folder);
  memcpy(above, folder, sizeof above);
  for (*made = 0; access(above, F_OK) != 0 && errno == ENOENT && strcmp(above, ".") != 0; ++*made) {
    char next[VD_PATH];
    vd_split_path(above, next, sizeof next);
    memcpy(above, next, sizeof above);
  }
  if (vd_make_folder(folder, err)) return vd_wrap(err, "cannot write %s", path);
  return VD_OK;
}

void vd_prepare_place_unmake(const char *path, int made) {
  char folder[VD_PATH], above[VD_PATH];
  vd_split_path(path, folder, sizeof folder);
  for (; made > 0 && rmdir(folder) == 0; made--) {
    vd_split_path(folder, above, sizeof above);
    memcpy(folder, above, sizeof folder);
  }
}

/* Attributes of a file of that kind; false when it is none. */
static bool read_texts(const char *path, const char *kind, const char *key, char *value, size_t size) {
  vd_error none = {0};
  hid_t file;
  char *text = NULL;
  if (vd_h5_open(path, kind, &file, &none)) return false;
  bool is_there = vd_h5_get_text(file, key, &text, &none) == VD_OK;
  if (is_there) snprintf(value, size, "%s", text);
  free(text);
  H5Fclose(file);
  return is_there;
}

void vd_prepare_place_id(vd_h5 *h5, const char *path, char id[64]) {
  vd_h5_lock(h5);
  if (!read_texts(path, "corpus", "corpus_id", id, 64)) id[0] = '\0';
  vd_h5_unlock(h5);
}

/* A look at the folder of a corpus that is about to be written. */
typedef struct look {
  const vd_corpus_plan *plan;
  const char *folder, *prefix;
  char id[64];  /* of the corpus at plan->path, or "" */
  bool is_ours; /* that corpus names its shards as the plan does */
  int64_t orphans;
} look;

/* Does the plan write a shard of that name? */
static bool is_planned(const look *l, const char *name) {
  char shard[VD_PATH + 64];
  for (int k = 0; k < VD_N_SPLIT; k++) {
    int64_t n = vd_shard_count(l->plan->n_token[k], l->plan->shard_tokens);
    const char *digits = strrchr(name, '-');
    int64_t index = digits ? strtoll(digits + 1, NULL, 10) : -1;
    if (index < 0 || index >= n) continue;
    vd_shard_name(l->prefix, k, index, shard, sizeof shard);
    if (strcmp(shard, name) == 0) return true;
  }
  return false;
}

/* A file that is named like one of our shards. */
static int look_at_shard(look *l, const char *name, const char *path, vd_error *err) {
  char id[64] = "";
  bool is_shard = read_texts(path, "shard", "corpus_id", id, sizeof id);
  if (is_shard && (strcmp(id, l->plan->id) == 0 || (l->id[0] && strcmp(id, l->id) == 0))) return VD_OK;
  /* A damaged shard of the corpus that is there. */
  if (!is_shard && l->is_ours && is_planned(l, name)) return VD_OK;
  if (is_planned(l, name))
    return vd_fail(err, VD_USAGE,
                   "%s would be overwritten, but it is %s%s: move it, remove it, or choose another data%%path", path,
                   is_shard ? "a shard of another corpus, " : "no shard", id);
  if (l->orphans++ < 5) printf("viaduct: %s is no shard of %s and is left alone\n", path, l->plan->path);
  return VD_OK;
}

/* Another HDF5 file in the folder: a corpus that was renamed keeps its shards under our prefix. */
static int look_at_other(const look *l, const char *name, const char *path, vd_error *err) {
  size_t n = strlen(name);
  struct stat st;
  char prefix[VD_PATH];
  if (n < 4 || strcmp(name + n - 3, ".h5") != 0 || name[0] == '.') return VD_OK;
  if (stat(path, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size > LARGEST_CORPUS) return VD_OK;
  vd_error none = {0};
  if (vd_digest_check(path, NULL, &none)) return VD_OK;
  if (!read_texts(path, "corpus", "shard_prefix", prefix, sizeof prefix) || strcmp(prefix, l->prefix) != 0)
    return VD_OK;
  return vd_fail(err, VD_USAGE,
                 "%s is a corpus whose shards are %s/%s-*.h5, the names that %s would use: choose another data%%path",
                 path, l->folder, l->prefix, l->plan->path);
}

int vd_prepare_place_shards(vd_h5 *h5, const vd_corpus_plan *plan, vd_error *err) {
  char folder[VD_PATH], prefix[VD_PATH], path[2 * VD_PATH], theirs[VD_PATH] = "";
  const char *own = vd_split_path(plan->path, folder, sizeof folder);
  vd_corpus_prefix(plan->path, prefix, sizeof prefix);
  look l = {.plan = plan, .folder = folder, .prefix = prefix};
  vd_prepare_place_id(h5, plan->path, l.id);
  DIR *dir = opendir(folder);
  if (!dir && errno == ENOENT) return VD_OK; /* with --check, which makes no folder */
  if (!dir) return vd_fail(err, VD_FAILED, "cannot read the folder %s: %s", folder, strerror(errno));
  vd_h5_lock(h5);
  l.is_ours = read_texts(plan->path, "corpus", "shard_prefix", theirs, sizeof theirs) && strcmp(theirs, prefix) == 0;
  for (struct dirent *e; err->status == VD_OK && (e = readdir(dir)) != NULL;) {
    if (strcmp(e->d_name, own) == 0 || vd_is_temporary(e->d_name, NULL)) continue;
    snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
    if (vd_corpus_owns(prefix, e->d_name))
      look_at_shard(&l, e->d_name, path, err);
    else
      look_at_other(&l, e->d_name, path, err);
  }
  vd_h5_unlock(h5);
  closedir(dir);
  if (l.orphans > 5) printf("viaduct: %lld more such files are left alone\n", (long long)(l.orphans - 5));
  return err->status;
}

int vd_prepare_lock_take(vd_prepare_lock *lock, const char *path, vd_error *err) {
  char folder[VD_PATH], owner[VD_LOCK_OWNER] = "";
  const char *name = vd_split_path(path, folder, sizeof folder);
  snprintf(lock->path, sizeof lock->path, "%s/.%s.lock", folder, name);
  for (;;) {
    struct stat opened, there;
    if (vd_file_lock_open(lock->path, true, &lock->fd, err)) return err->status;
    enum vd_lock_state state = vd_file_lock(lock->fd, owner);
    if (state == VD_LOCK_UNSUPPORTED)
      printf("viaduct: %s cannot be locked (%s): make sure that no other prepare writes %s\n", lock->path,
             strerror(errno), path);
    if (state == VD_LOCK_BUSY) {
      close(lock->fd);
      lock->fd = -1;
      return vd_fail(err, VD_FAILED, "another prepare is writing %s (%s): wait for its end", path,
                     owner[0] ? owner : "it did not say which");
    }
    /* The holder before may have removed the file that we waited for. */
    if (fstat(lock->fd, &opened) == 0 && stat(lock->path, &there) == 0 && opened.st_ino == there.st_ino &&
        opened.st_dev == there.st_dev)
      break;
    close(lock->fd);
  }
  vd_file_lock_sign(lock->fd);
  return VD_OK;
}

void vd_prepare_lock_release(vd_prepare_lock *lock) {
  if (lock->fd < 0) return;
  unlink(lock->path);
  close(lock->fd);
  lock->fd = -1;
}
