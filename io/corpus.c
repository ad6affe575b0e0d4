#include "io/corpus.h"
#include "io/corpus_layout.h"
#include "io/digest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OPEN_SHARDS = 16 };

/* One shard that is held open. */
typedef struct open_shard {
  int split;
  int64_t index, used; /* used: when, counted in reads */
  hid_t file, tokens;  /* -1: this place is free */
} open_shard;

struct vd_corpus {
  vd_h5 *h5;
  char *path, *prefix, *id;
  char *real; /* path with links followed: shards lie beside the real file */
  bool words;
  int64_t shard_tokens, n_token[VD_N_SPLIT];
  vd_vocabulary vocabulary, adopted; /* adopted: of a model, n = 0: none */
  int32_t *map;                      /* [vocabulary.n] ids of the adopted one; NULL: none */
  open_shard open[OPEN_SHARDS];
  int64_t reads;
};

static int64_t shard_length(const vd_corpus *c, int split, int64_t index) {
  return vd_shard_length(c->n_token[split], c->shard_tokens, index);
}

/* Length and element size of an open dataset of rank 1 of unsigned integers; -1 where it is anything else. */
static int64_t length_of(hid_t dataset, size_t *size) {
  hid_t space = H5Dget_space(dataset), type = H5Dget_type(dataset);
  hsize_t n = 0;
  bool is_right =
      H5Sget_simple_extent_ndims(space) == 1 && H5Tget_class(type) == H5T_INTEGER && H5Tget_sign(type) == H5T_SGN_NONE;
  if (is_right) H5Sget_simple_extent_dims(space, &n, NULL);
  *size = H5Tget_size(type);
  H5Tclose(type);
  H5Sclose(space);
  return is_right ? (int64_t)n : -1;
}

static int check_shard(const vd_corpus *c, hid_t file, int split, int64_t index, vd_error *err) {
  char *id = NULL, *name = NULL;
  int64_t first = -1;
  if (vd_h5_get_text(file, "corpus_id", &id, err) == VD_OK && vd_h5_get_text(file, "split", &name, err) == VD_OK &&
      vd_h5_get_i64(file, "first_token", &first, err) == VD_OK) {
    if (strcmp(id, c->id) != 0)
      vd_fail(err, VD_FAILED, "it belongs to the corpus %s, not to %s", id, c->id);
    else if (strcmp(name, vd_split_name(split)) != 0 || first != index * c->shard_tokens)
      vd_fail(err, VD_FAILED, "it holds %s from token %lld on, not %s from token %lld on", name, (long long)first,
              vd_split_name(split), (long long)index * c->shard_tokens);
  }
  free(id);
  free(name);
  return err->status;
}

static int open_tokens(const vd_corpus *c, open_shard *s, vd_error *err) {
  if (vd_h5_open_dataset(s->file, "/tokens", &s->tokens, err)) return err->status;
  size_t size, wanted = c->vocabulary.n > 256 ? 2 : 1;
  int64_t n = length_of(s->tokens, &size);
  if (n != shard_length(c, s->split, s->index) || size != wanted)
    vd_fail(err, VD_FAILED, "it has %lld tokens of %zu bytes, not %lld of %zu", (long long)n, size,
            (long long)shard_length(c, s->split, s->index), wanted);
  return err->status;
}

static void close_shard(open_shard *s) {
  if (s->tokens >= 0) H5Dclose(s->tokens);
  if (s->file >= 0) H5Fclose(s->file);
  s->tokens = s->file = -1;
}

/* The shard, opened in the place that was not used for longest, and checked. Wants the lock. */
static open_shard *shard_of(vd_corpus *c, int split, int64_t index, vd_error *err) {
  open_shard *s = &c->open[0];
  c->reads++;
  for (int i = 0; i < OPEN_SHARDS; i++) {
    open_shard *o = &c->open[i];
    if (o->file >= 0 && o->split == split && o->index == index) {
      o->used = c->reads;
      return o;
    }
    if (o->used < s->used) s = o;
  }
  close_shard(s);
  char path[1100];
  if (vd_shard_path(c->real, c->prefix, split, index, path, sizeof path, err)) return NULL;
  s->split = split;
  s->index = index;
  s->used = c->reads;
  if (vd_h5_open(path, "shard", &s->file, err)) {
    vd_wrap(err, "shard");
    return NULL;
  }
  if (check_shard(c, s->file, split, index, err) || open_tokens(c, s, err)) {
    close_shard(s);
    vd_wrap(err, "shard %s", path);
    return NULL;
  }
  return s;
}

static int read_index(vd_corpus *c, hid_t file, vd_error *err) {
  char *symbols = NULL;
  if (vd_h5_get_text(file, "corpus_id", &c->id, err) || vd_h5_get_text(file, "shard_prefix", &c->prefix, err) ||
      vd_h5_get_i64(file, "shard_tokens", &c->shard_tokens, err) || vd_h5_get_text(file, "symbols", &symbols, err))
    return err->status;
  c->words = strcmp(symbols, "words") == 0;
  free(symbols);
  if (!c->prefix[0] || c->prefix[0] == '.' || strchr(c->prefix, '/'))
    return vd_fail(err, VD_FAILED, "shard_prefix is '%s', no plain name of files beside the corpus", c->prefix);
  if (c->shard_tokens < 1) return vd_fail(err, VD_FAILED, "shard_tokens is %lld", (long long)c->shard_tokens);
  if (vd_vocabulary_read(file, &c->vocabulary, err)) return err->status;
  for (int k = 0; k < VD_N_SPLIT; k++) {
    hid_t id = H5Dopen2(file, vd_split_name(k), H5P_DEFAULT);
    if (id < 0) return vd_h5_fail(err, "there is no split %s", vd_split_name(k));
    size_t size;
    c->n_token[k] = length_of(id, &size);
    H5Dclose(id);
    if (c->n_token[k] < 0)
      return vd_fail(err, VD_FAILED, "the split %s is no list of unsigned integers", vd_split_name(k));
  }
  return VD_OK;
}

static int open_all(vd_corpus *c, vd_error *err) {
  hid_t file;
  if (vd_h5_open(c->path, "corpus", &file, err)) return err->status;
  read_index(c, file, err);
  H5Fclose(file);
  if (err->status) return vd_wrap(err, "%s", c->path);
  for (int k = 0; k < VD_N_SPLIT; k++) {
    int64_t n = vd_shard_count(c->n_token[k], c->shard_tokens);
    for (int64_t i = 0; i < n; i++)
      if (!shard_of(c, k, i, err)) return vd_wrap(err, "%s", c->path);
  }
  return VD_OK;
}

int vd_corpus_open(vd_corpus **corpus, vd_h5 *h5, const char *path, vd_error *err) {
  *corpus = NULL;
  vd_corpus *c = vd_calloc(1, sizeof *c);
  c->h5 = h5;
  c->path = vd_calloc(strlen(path) + 1, 1);
  memcpy(c->path, path, strlen(path));
  c->real = realpath(path, NULL);
  if (!c->real) c->real = strdup(path); /* it is not there: opening it says so */
  if (!c->real) vd_bug("no memory for a path");
  for (int i = 0; i < OPEN_SHARDS; i++) c->open[i].file = c->open[i].tokens = -1;
  bool sealed = false;
  vd_error seal = {0};
  vd_h5_lock(h5);
  /* Damage shows in the seal before HDF5 parses it; what is no corpus at all gets vd_h5_open()'s plainer words. */
  vd_digest_check(path, &sealed, &seal);
  if (!(seal.status && sealed)) open_all(c, err);
  if (err->status == VD_OK) *err = seal;
  vd_h5_unlock(h5);
  if (err->status)
    vd_corpus_close(c);
  else
    *corpus = c;
  return err->status;
}

void vd_corpus_close(vd_corpus *c) {
  if (!c) return;
  vd_h5_lock(c->h5);
  for (int i = 0; i < OPEN_SHARDS; i++) close_shard(&c->open[i]);
  vd_h5_unlock(c->h5);
  vd_vocabulary_free(&c->vocabulary);
  vd_vocabulary_free(&c->adopted);
  free(c->map);
  free(c->path);
  free(c->prefix);
  free(c->real);
  free(c->id);
  free(c);
}

int vd_corpus_length(const vd_corpus *corpus, const char *split, int64_t *n, vd_error *err) {
  int k = vd_split_number(split);
  if (k < 0)
    return vd_fail(err, VD_USAGE, "the corpus has no split '%s'; there are 'train', 'valid' and 'test'", split);
  *n = corpus->n_token[k];
  return VD_OK;
}

int64_t vd_corpus_vocab(const vd_corpus *corpus) {
  return vd_corpus_vocabulary(corpus)->n;
}

/* Tokens [first, first + n) of one shard. Wants the lock. */
static int read_part(vd_corpus *c, int split, int64_t index, hsize_t first, hsize_t n, int32_t *out, vd_error *err) {
  open_shard *s = shard_of(c, split, index, err);
  if (!s) return err->status;
  hid_t memory = H5Screate_simple(1, &n, NULL), space = H5Dget_space(s->tokens);
  H5Sselect_hyperslab(space, H5S_SELECT_SET, &first, NULL, &n, NULL);
  if (H5Dread(s->tokens, H5T_NATIVE_INT32, memory, space, H5P_DEFAULT, out) < 0)
    vd_h5_fail(err, "tokens %llu to %llu are damaged or cannot be read", (unsigned long long)first,
               (unsigned long long)(first + n - 1));
  H5Sclose(space);
  H5Sclose(memory);
  for (hsize_t i = 0; i < n && err->status == VD_OK; i++)
    if (out[i] >= c->vocabulary.n)
      vd_fail(err, VD_FAILED, "token %llu is %d, but there are only %lld symbols", (unsigned long long)(first + i),
              (int)out[i], (long long)c->vocabulary.n);
  for (hsize_t i = 0; c->map && i < n && err->status == VD_OK; i++) {
    if (c->map[out[i]] < 0)
      vd_fail(err, VD_FAILED, "token %llu is a symbol that the corpus counts none of", (unsigned long long)(first + i));
    out[i] = c->map[out[i]];
  }
  if (err->status == VD_OK) return VD_OK;
  char path[1100];
  vd_error none = {0};
  vd_shard_path(c->real, c->prefix, split, index, path, sizeof path, &none);
  close_shard(s);
  return vd_wrap(err, "shard %s", path);
}

int vd_corpus_read(vd_corpus *corpus, const char *split, int64_t first, int64_t n, int32_t *out, vd_error *err) {
  int k = vd_split_number(split);
  if (k < 0 || first < 0 || n < 0 || first + n > corpus->n_token[k])
    vd_bug("tokens %lld to %lld of %s do not exist", (long long)first, (long long)(first + n), split);
  vd_h5_lock(corpus->h5);
  while (n > 0 && err->status == VD_OK) {
    int64_t index = first / corpus->shard_tokens, at = first % corpus->shard_tokens;
    int64_t part = shard_length(corpus, k, index) - at;
    if (part > n) part = n;
    read_part(corpus, k, index, (hsize_t)at, (hsize_t)part, out, err);
    out += part;
    first += part;
    n -= part;
  }
  vd_h5_unlock(corpus->h5);
  return err->status;
}

const vd_vocabulary *vd_corpus_vocabulary(const vd_corpus *c) {
  return c->map ? &c->adopted : &c->vocabulary;
}

int vd_corpus_adopt(vd_corpus *c, const vd_vocabulary *model, vd_error *err) {
  const vd_vocabulary *own = &c->vocabulary;
  int32_t *map = vd_calloc((size_t)own->n, sizeof *map);
  if (vd_vocabulary_map(own, model, map, err)) {
    free(map);
    return vd_wrap(err, "%s", c->path);
  }
  bool same = own->n == model->n;
  for (int64_t i = 0; same && i < own->n; i++) same = map[i] == i;
  if (same) {
    free(map);
    return VD_OK;
  }
  vd_vocabulary_free(&c->adopted);
  free(c->map);
  c->map = map;
  c->adopted = (vd_vocabulary){.n = model->n,
                               .width = model->width,
                               .symbol = vd_calloc((size_t)model->n, (size_t)model->width),
                               .length = vd_calloc((size_t)model->n, sizeof *model->length),
                               .count = vd_calloc((size_t)model->n, sizeof *model->count)};
  memcpy(c->adopted.symbol, model->symbol, (size_t)(model->n * model->width));
  memcpy(c->adopted.length, model->length, (size_t)model->n * sizeof *model->length);
  memcpy(c->adopted.count, model->count, (size_t)model->n * sizeof *model->count);
  return VD_OK;
}

const char *vd_corpus_symbol(const vd_corpus *corpus, int64_t id, size_t *n) {
  const vd_vocabulary *v = vd_corpus_vocabulary(corpus);
  if (id < 0 || id >= v->n) vd_bug("there is no symbol %lld", (long long)id);
  *n = (size_t)v->length[id];
  return (const char *)v->symbol + id * v->width;
}

int64_t vd_corpus_encode(const vd_corpus *corpus, const char *text, size_t n, size_t *used) {
  const vd_vocabulary *v = vd_corpus_vocabulary(corpus);
  int64_t best = -1;
  *used = 0;
  for (int64_t i = 0; i < v->n; i++) {
    size_t length = (size_t)v->length[i];
    if (length > n || length <= *used || memcmp(v->symbol + i * v->width, text, length) != 0) continue;
    best = i;
    *used = length;
  }
  return best;
}

bool vd_corpus_is_word_level(const vd_corpus *corpus) {
  return corpus->words;
}

const char *vd_corpus_id(const vd_corpus *corpus) {
  return corpus->id;
}

const char *vd_corpus_place(const vd_corpus *corpus, const char **prefix) {
  *prefix = corpus->prefix;
  return corpus->real;
}
