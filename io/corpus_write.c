#include "io/corpus_write.h"
#include "io/corpus.h"
#include "io/digest.h"
#include "src/base/regular_file.h"

#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHARD_CHUNK = 65536 }; /* tokens; what a reader fetches at once */
enum { FLETCHER_BYTES = 4 };  /* checksum behind the data of a chunk */

struct vd_shard {
  vd_h5 *h5;
  vd_h5_out out;
  hid_t tokens;
  size_t width; /* bytes of a token */
  bool direct;  /* chunks go to the file as they are, else through HDF5's filters and conversion */
  int64_t n, chunk, done;
  uint8_t *waiting; /* tokens of the chunk that is not full yet, and room for its checksum */
};

static bool is_wide(const vd_corpus_plan *plan) {
  return plan->vocabulary.n > 256;
}

size_t vd_corpus_token_bytes(const vd_corpus_plan *plan) {
  return is_wide(plan) ? sizeof(uint16_t) : sizeof(uint8_t);
}

static int shard_attributes(hid_t file, const vd_corpus_plan *plan, int split, int64_t index, vd_error *err) {
  vd_h5_attr_text(file, "corpus_id", plan->id, err);
  vd_h5_attr_text(file, "split", vd_split_name(split), err);
  vd_h5_attr_i64(file, "first_token", index * plan->shard_tokens, err);
  return err->status;
}

int vd_shard_begin(vd_shard **shard, vd_h5 *h5, const vd_corpus_plan *plan, int split, int64_t index, vd_error *err) {
  char path[1100], prefix[1024];
  *shard = NULL;
  vd_corpus_prefix(plan->path, prefix, sizeof prefix);
  if (vd_shard_path(plan->path, prefix, split, index, path, sizeof path, err)) return err->status;
  vd_shard *s = vd_calloc(1, sizeof *s);
  *s = (vd_shard){
      .h5 = h5,
      .tokens = -1,
      .width = vd_corpus_token_bytes(plan),
  };
  s->n = vd_shard_length(plan->n_token[split], plan->shard_tokens, index);
  s->chunk = s->n < SHARD_CHUNK ? s->n : SHARD_CHUNK;
  s->waiting = vd_calloc((size_t)s->chunk * s->width + FLETCHER_BYTES, 1);
  vd_dataset d = {.path = "/tokens",
                  .dtype = s->width == 2 ? VD_U16 : VD_U8,
                  .rank = 1,
                  .shape = {(hsize_t)s->n},
                  .chunk = {(hsize_t)s->chunk},
                  .dimension = {"token"},
                  .units = "1",
                  .long_name = "ids of the symbols, in the order of the source",
                  .deflate = plan->deflate};
  vd_h5_lock(h5);
  s->direct = plan->deflate == 0 && (s->width == 1 || H5Tget_order(H5T_NATIVE_UINT16) == H5T_ORDER_LE);
  if (vd_h5_begin(&s->out, path, "shard", &plan->origin, err) == VD_OK) {
    if (shard_attributes(s->out.file, plan, split, index, err) == VD_OK)
      vd_h5_dataset(s->out.file, &d, NULL, &s->tokens, err);
  }
  vd_h5_unlock(h5);
  *shard = s;
  if (err->status) vd_shard_abandon(shard);
  return err->status;
}

int64_t vd_shard_wants(const vd_shard *shard) {
  return shard->n - shard->done;
}

/* The checksum of HDF5's filter fletcher32 over x [n]: two sums, modulo 65535, of big-endian words of 16 bits, a last
 * odd byte being the high one of a word. HDF5's own folds the sums after every 360 words, so that 65535 stands for 0
 * unless all words are 0. The compiler makes vector code of the inner loop. */
static uint32_t fletcher32(const uint8_t *x, size_t n) {
  enum { WORDS = 256, BASE = 65535 }; /* the sums of a part stay below 2^32 */
  uint64_t a = 0, b = 0;
  bool any = false;
  for (size_t at = 0; at < n; at += 2 * WORDS) {
    uint32_t m = n - at < 2 * WORDS ? (uint32_t)(n - at) / 2 : WORDS, sum = 0, weighted = 0;
    for (uint32_t i = 0; i < m; i++) {
      uint32_t word = (uint32_t)x[at + 2 * i] << 8 | x[at + 2 * i + 1];
      sum += word;
      weighted += (m - i) * word;
    }
    b = (b + m * a + weighted) % BASE;
    a = (a + sum) % BASE;
    any = any || sum > 0;
  }
  if (n % 2 == 1) {
    uint32_t word = (uint32_t)x[n - 1] << 8;
    a = (a + word) % BASE;
    b = (b + a) % BASE;
    any = any || word > 0;
  }
  if (any && a == 0) a = BASE;
  if (any && b == 0) b = BASE;
  return (uint32_t)(b << 16 | a);
}

/* Under the lock. Writes the chunk in s->waiting, which is full or the last one of the shard. HDF5's own way to the
 * file copies it twice and takes longer for the checksum. */
static int write_chunk(vd_shard *s, vd_error *err) {
  hsize_t first = (hsize_t)((s->done - 1) / s->chunk * s->chunk), n = (hsize_t)s->done - first;
  size_t whole = (size_t)s->chunk * s->width;
  if (s->direct) {
    memset(s->waiting + n * s->width, 0, whole - n * s->width);
    uint32_t check = htole32(fletcher32(s->waiting, whole));
    memcpy(s->waiting + whole, &check, FLETCHER_BYTES);
    if (H5Dwrite_chunk(s->tokens, H5P_DEFAULT, 0, &first, whole + FLETCHER_BYTES, s->waiting) < 0)
      vd_h5_fail(err, "cannot write %s", s->out.at.path);
    return err->status;
  }
  hid_t memory = H5Screate_simple(1, &n, NULL), space = H5Dget_space(s->tokens);
  H5Sselect_hyperslab(space, H5S_SELECT_SET, &first, NULL, &n, NULL);
  if (H5Dwrite(s->tokens, vd_h5_type(s->width == 2 ? VD_U16 : VD_U8), memory, space, H5P_DEFAULT, s->waiting) < 0)
    vd_h5_fail(err, "cannot write %s", s->out.at.path); /* before HDF5's next call clears the reason */
  H5Sclose(space);
  H5Sclose(memory);
  return err->status;
}

int vd_shard_put(vd_shard *s, const void *tokens, int64_t n, vd_error *err) {
  const uint8_t *from = tokens;
  if (n > vd_shard_wants(s)) vd_bug("%lld tokens too many for %s", (long long)n, s->out.at.path);
  while (n > 0 && err->status == VD_OK) {
    int64_t at = s->done % s->chunk, part = s->chunk - at < n ? s->chunk - at : n;
    memcpy(s->waiting + (size_t)at * s->width, from, (size_t)part * s->width);
    from += (size_t)part * s->width;
    n -= part;
    s->done += part;
    if (at + part < s->chunk && s->done < s->n) break;
    vd_h5_lock(s->h5);
    write_chunk(s, err);
    vd_h5_unlock(s->h5);
  }
  return err->status;
}

int vd_shard_finish(vd_shard *s, vd_error *err) {
  if (vd_shard_wants(s) != 0) vd_bug("%s still wants %lld tokens", s->out.at.path, (long long)vd_shard_wants(s));
  vd_h5_lock(s->h5);
  if (H5Dclose(s->tokens) < 0) vd_h5_fail(err, "cannot write %s", s->out.at.path);
  s->tokens = -1;
  if (err->status == VD_OK) vd_h5_finish(&s->out, err);
  vd_h5_unlock(s->h5);
  return err->status;
}

int vd_shard_commit(vd_shard **shard, vd_error *err) {
  vd_shard *s = *shard;
  /* The finished file is closed: its sync and rename need no lock. */
  if (s->tokens < 0 || vd_shard_finish(s, err) == VD_OK) vd_h5_commit(&s->out, err);
  vd_shard_abandon(shard); /* of a committed file there is nothing left to remove */
  return err->status;
}

void vd_shard_abandon(vd_shard **shard) {
  vd_shard *s = *shard;
  if (!s) return;
  vd_h5_lock(s->h5);
  if (s->tokens >= 0) H5Dclose(s->tokens);
  vd_h5_abandon(&s->out);
  vd_h5_unlock(s->h5);
  free(s->waiting);
  free(s);
  *shard = NULL;
}

/* HDF5 takes the names of a virtual dataset's sources for patterns: %b is the number of a block, %% is a percent sign.
 */
static void escape_percent(const char *name, char *escaped, size_t size) {
  size_t n = 0;
  for (; *name && n + 2 < size; name++) {
    if (*name == '%') escaped[n++] = '%';
    escaped[n++] = *name;
  }
  escaped[n] = '\0';
}

/* /train, /valid or /test: a virtual dataset over its shards, named relative to NAME.h5 so that the folder can move. */
static int write_split(hid_t file, const vd_corpus_plan *plan, int split, vd_error *err) {
  char path[16], dimension[32], long_name[128];
  snprintf(path, sizeof path, "/%s", vd_split_name(split));
  snprintf(dimension, sizeof dimension, "%s_token", vd_split_name(split));
  snprintf(long_name, sizeof long_name, "ids of the symbols of the split %s", vd_split_name(split));
  hsize_t n = (hsize_t)plan->n_token[split];
  vd_dataset d = {.path = path,
                  .dtype = is_wide(plan) ? VD_U16 : VD_U8,
                  .rank = 1,
                  .shape = {n},
                  .dimension = {dimension},
                  .units = "1",
                  .long_name = long_name};
  if (n == 0) return vd_h5_dataset(file, &d, NULL, NULL, err);
  hid_t type = is_wide(plan) ? H5T_STD_U16LE : H5T_STD_U8LE;
  hid_t space = H5Screate_simple(1, &n, NULL), list = H5Pcreate(H5P_DATASET_CREATE);
  /* What foreign readers see of a missing shard; our own reader opens the shards themselves and says so. */
  uint16_t missing = is_wide(plan) ? UINT16_MAX : UINT8_MAX;
  H5Pset_fill_value(list, H5T_NATIVE_UINT16, &missing);
  int64_t shards = vd_shard_count(plan->n_token[split], plan->shard_tokens);
  char prefix[1024], shard[1100], name[2200];
  vd_corpus_prefix(plan->path, prefix, sizeof prefix);
  for (int64_t i = 0; i < shards && err->status == VD_OK; i++) {
    hsize_t first = (hsize_t)i * (hsize_t)plan->shard_tokens;
    hsize_t count = (hsize_t)vd_shard_length(plan->n_token[split], plan->shard_tokens, i);
    vd_shard_name(prefix, split, i, shard, sizeof shard);
    hid_t source = H5Screate_simple(1, &count, NULL);
    H5Sselect_hyperslab(space, H5S_SELECT_SET, &first, NULL, &count, NULL);
    escape_percent(shard, name, sizeof name);
    if (H5Pset_virtual(list, space, name, "/tokens", source) < 0) vd_h5_fail(err, "cannot map %s", shard);
    H5Sclose(source);
  }
  H5Sselect_all(space);
  hid_t id = err->status ? -1 : H5Dcreate2(file, path + 1, type, space, H5P_DEFAULT, list, H5P_DEFAULT);
  if (id < 0)
    vd_h5_fail(err, "cannot create the virtual dataset %s", path);
  else
    vd_h5_describe(file, id, &d, err);
  if (id >= 0) H5Dclose(id);
  H5Pclose(list);
  H5Sclose(space);
  return err->status;
}

static int write_attributes(hid_t file, const vd_corpus_plan *plan, vd_error *err) {
  char prefix[1024];
  vd_corpus_prefix(plan->path, prefix, sizeof prefix);
  vd_h5_attr_text(file, "corpus_id", plan->id, err);
  vd_h5_attr_text(file, "symbols", plan->words ? "words" : "bytes", err);
  vd_h5_attr_text(file, "shard_prefix", prefix, err);
  vd_h5_attr_i64(file, "shard_tokens", plan->shard_tokens, err);
  vd_h5_attr_i64(file, "deflate", plan->deflate, err);
  vd_h5_attr_text(file, "split_rule", plan->split_rule, err);
  for (int i = 0; i < plan->n_source && err->status == VD_OK; i++) {
    char key[64], of[16] = "";
    if (plan->n_source > 1) snprintf(of, sizeof of, "_%s", vd_split_name(i));
    snprintf(key, sizeof key, "source%s", of);
    vd_h5_attr_text(file, key, plan->source[i], err);
    snprintf(key, sizeof key, "source%s_bytes", of);
    vd_h5_attr_i64(file, key, plan->source_bytes[i], err);
    snprintf(key, sizeof key, "source%s_md5", of);
    vd_h5_attr_text(file, key, plan->source_md5[i], err);
  }
  return err->status;
}

int vd_corpus_write(vd_h5 *h5, const vd_corpus_plan *plan, vd_error *err) {
  vd_h5_out out;
  vd_h5_lock(h5);
  if (vd_h5_begin(&out, plan->path, "corpus", &plan->origin, err) == VD_OK) {
    write_attributes(out.file, plan, err);
    for (int k = 0; k < VD_N_SPLIT && err->status == VD_OK; k++) write_split(out.file, plan, k, err);
    if (err->status == VD_OK) vd_vocabulary_write(out.file, &plan->vocabulary, err);
    if (err->status == VD_OK && vd_h5_finish(&out, err) == VD_OK && vd_digest_seal(out.at.temporary, err) == VD_OK)
      vd_h5_commit(&out, err);
    if (err->status) vd_h5_abandon(&out);
  }
  vd_h5_unlock(h5);
  return err->status;
}

/* True when the file at `path` is a shard of the corpus `id`. */
static bool is_shard_of(const char *path, const char *id) {
  vd_error none = {0};
  hid_t file;
  char *found = NULL;
  if (vd_h5_open(path, "shard", &file, &none)) return false;
  bool is_ours = vd_h5_get_text(file, "corpus_id", &found, &none) == VD_OK && strcmp(found, id) == 0;
  free(found);
  H5Fclose(file);
  return is_ours;
}

/* A temporary that a killed process left: HDF5, or zeros where HDF5 had not written the beginning yet. Text of a user's
 * under such a name is none. */
static bool is_leftover(const char *path) {
  char head[8] = "";
  int fd;
  vd_error none = {0};
  if (vd_open_regular(path, &fd, NULL, &none)) return false;
  ssize_t n = pread(fd, head, sizeof head, 0);
  close(fd);
  return n == 0 || (n == (ssize_t)sizeof head &&
                    (memcmp(head, "\x89HDF\r\n\x1a\n", 8) == 0 || memcmp(head, "\0\0\0\0\0\0\0\0", 8) == 0));
}

/* Removes NAME.h5; refuses what is no corpus, whoever has put it there since the caller looked. */
static int remove_index(vd_h5 *h5, const char *path, vd_error *err) {
  struct stat st;
  hid_t file;
  if (lstat(path, &st) != 0) return VD_OK;
  vd_h5_lock(h5);
  if (vd_h5_open(path, "corpus", &file, err) == VD_OK) H5Fclose(file);
  vd_h5_unlock(h5);
  if (err->status) return vd_wrap(err, "%s is not replaced", path);
  if (unlink(path) != 0 && errno != ENOENT)
    return vd_fail(err, VD_FAILED, "cannot remove %s: %s", path, strerror(errno));
  return VD_OK;
}

int vd_corpus_remove(vd_h5 *h5, const char *path, const char *id, vd_error *err) {
  char folder[1024], prefix[1024], shard[2100];
  vd_split_path(path, folder, sizeof folder);
  vd_corpus_prefix(path, prefix, sizeof prefix);
  if (remove_index(h5, path, err)) return err->status;
  /* The removal of NAME.h5 must be durable before the shards that it maps are removed. */
  if (vd_sync_folder(path, err)) return err->status;
  DIR *dir = opendir(folder);
  if (!dir) return vd_fail(err, VD_FAILED, "cannot read the folder %s: %s", folder, strerror(errno));
  vd_h5_lock(h5);
  for (struct dirent *e; (e = readdir(dir)) != NULL;) {
    snprintf(shard, sizeof shard, "%s/%s", folder, e->d_name);
    if (!vd_corpus_owns(prefix, e->d_name)) continue;
    if (!(vd_is_temporary(e->d_name, NULL) ? is_leftover(shard) : is_shard_of(shard, id))) continue;
    if (unlinkat(dirfd(dir), e->d_name, 0) != 0 && errno != ENOENT)
      vd_fail(err, VD_FAILED, "cannot remove %s: %s", shard, strerror(errno));
  }
  vd_h5_unlock(h5);
  closedir(dir);
  return err->status;
}

/* True when the attributes of an open NAME.h5 are those of the plan; else `why` names the first that is not. */
static bool same_attributes(hid_t file, const vd_corpus_plan *plan, char *why, size_t size) {
  vd_error none = {0};
  char *id = NULL;
  int64_t shard_tokens = 0, deflate = 0;
  if (vd_h5_get_text(file, "corpus_id", &id, &none) || vd_h5_get_i64(file, "shard_tokens", &shard_tokens, &none) ||
      vd_h5_get_i64(file, "deflate", &deflate, &none))
    snprintf(why, size, "%s", none.message);
  else if (strcmp(id, plan->id) != 0)
    snprintf(why, size, "it was made from another source or split in another way");
  else if (shard_tokens != plan->shard_tokens)
    snprintf(why, size, "its shards have %lld tokens", (long long)shard_tokens);
  else if (deflate != plan->deflate)
    snprintf(why, size, "it was written with deflate = %lld", (long long)deflate);
  free(id);
  return why[0] == '\0';
}

enum vd_corpus_state vd_corpus_compare(vd_h5 *h5, const vd_corpus_plan *plan, char *why, size_t size) {
  vd_error err = {0};
  why[0] = '\0';
  if (access(plan->path, F_OK) != 0) return VD_CORPUS_ABSENT;
  vd_h5_lock(h5);
  hid_t file;
  bool same = false;
  if (vd_h5_open(plan->path, "corpus", &file, &err) == VD_OK) {
    same = same_attributes(file, plan, why, size);
    H5Fclose(file);
  } else {
    snprintf(why, size, "%s", err.message);
  }
  vd_h5_unlock(h5);
  if (!same) return VD_CORPUS_OTHER;
  vd_corpus *corpus;
  if (vd_corpus_open(&corpus, h5, plan->path, &err)) {
    snprintf(why, size, "%s", err.message);
    return VD_CORPUS_DAMAGED;
  }
  vd_corpus_close(corpus);
  return VD_CORPUS_SAME;
}
