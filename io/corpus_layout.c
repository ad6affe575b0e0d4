#include "io/corpus_layout.h"

#include "io/atomic_file.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const split_names[VD_N_SPLIT] = {
    [VD_SPLIT_TRAIN] = "train", [VD_SPLIT_VALID] = "valid", [VD_SPLIT_TEST] = "test"};

const char *vd_split_name(int split) {
  if (split < 0 || split >= VD_N_SPLIT) vd_bug("there is no split %d", split);
  return split_names[split];
}

int vd_split_number(const char *name) {
  for (int k = 0; k < VD_N_SPLIT; k++)
    if (strcmp(name, split_names[k]) == 0) return k;
  return -1;
}

int64_t vd_shard_count(int64_t n_token, int64_t shard_tokens) {
  return n_token == 0 ? 0 : (n_token - 1) / shard_tokens + 1;
}

int64_t vd_shard_length(int64_t n_token, int64_t shard_tokens, int64_t index) {
  int64_t left = n_token - index * shard_tokens;
  return left < shard_tokens ? left : shard_tokens;
}

void vd_corpus_prefix(const char *corpus_path, char *prefix, size_t size) {
  const char *slash = strrchr(corpus_path, '/'), *name = slash ? slash + 1 : corpus_path;
  size_t n = strlen(name);
  if (n > 3 && strcmp(name + n - 3, ".h5") == 0) n -= 3;
  snprintf(prefix, size, "%.*s", (int)n, name);
}

void vd_shard_name(const char *prefix, int split, int64_t index, char *name, size_t size) {
  int n = snprintf(name, size, "%s-%s-%04lld.h5", prefix, vd_split_name(split), (long long)index);
  if (n < 0 || (size_t)n >= size) vd_bug("the name of a shard is too long: %s", prefix);
}

int vd_shard_path(const char *corpus_path, const char *prefix, int split, int64_t index, char *path, size_t size,
                  vd_error *err) {
  const char *slash = strrchr(corpus_path, '/');
  int n = snprintf(path, size, "%.*s%s-%s-%04lld.h5", slash ? (int)(slash + 1 - corpus_path) : 0, corpus_path, prefix,
                   vd_split_name(split), (long long)index);
  if (n < 0 || (size_t)n >= size) return vd_fail(err, VD_FAILED, "the path is too long: %s", corpus_path);
  return VD_OK;
}

/* True for SPLIT-0000.h5 with at least four digits. */
static bool is_shard_suffix(const char *text) {
  for (int k = 0; k < VD_N_SPLIT; k++) {
    size_t n = strlen(split_names[k]);
    if (strncmp(text, split_names[k], n) != 0 || text[n] != '-') continue;
    const char *first = text + n + 1, *end = first;
    while (isdigit((unsigned char)*end)) end++;
    return end - first >= 4 && strcmp(end, ".h5") == 0;
  }
  return false;
}

bool vd_corpus_owns(const char *prefix, const char *name) {
  size_t n = strlen(prefix);
  char plain[1200];
  snprintf(plain, sizeof plain, "%s", name);
  bool temporary = vd_is_temporary(name, NULL);
  if (temporary) {
    /* .NAME.tmp-PID: NAME may hold ".tmp-" itself, so that the last one counts. */
    char *mark = strstr(plain, ".tmp-");
    for (char *next; (next = strstr(mark + 1, ".tmp-")) != NULL;) mark = next;
    *mark = '\0';
    memmove(plain, plain + 1, strlen(plain));
  }
  if (strncmp(plain, prefix, n) != 0) return false;
  if (temporary && strcmp(plain + n, ".h5") == 0) return true;
  return plain[n] == '-' && is_shard_suffix(plain + n + 1);
}

int vd_vocabulary_write(hid_t file, const vd_vocabulary *v, vd_error *err) {
  vd_dataset symbol = {.path = "/vocabulary/symbol",
                       .dtype = VD_U8,
                       .rank = 2,
                       .shape = {(hsize_t)v->n, (hsize_t)v->width},
                       .dimension = {"symbol_id", "byte"},
                       .units = "1",
                       .long_name = "bytes of each symbol, padded with zeros behind vocabulary/length",
                       .deflate = 4};
  vd_dataset length = {.path = "/vocabulary/length",
                       .dtype = VD_I32,
                       .rank = 1,
                       .shape = {(hsize_t)v->n},
                       .dimension = {"symbol_id"},
                       .units = "bytes",
                       .long_name = "length of each symbol"};
  vd_dataset count = {.path = "/vocabulary/count",
                      .dtype = VD_I64,
                      .rank = 1,
                      .shape = {(hsize_t)v->n},
                      .dimension = {"symbol_id"},
                      .units = "tokens",
                      .long_name = "occurrences of each symbol in the whole source"};
  if (vd_h5_dataset(file, &symbol, v->symbol, NULL, err) || vd_h5_dataset(file, &length, v->length, NULL, err) ||
      vd_h5_dataset(file, &count, v->count, NULL, err))
    return err->status;
  return VD_OK;
}

static int read_whole(hid_t file, const char *path, hid_t type, hsize_t n, void *out, vd_error *err) {
  hid_t id;
  if (vd_h5_open_dataset(file, path, &id, err)) return err->status;
  hid_t space = H5Dget_space(id), stored = H5Dget_type(id);
  bool is_integer = H5Tget_class(stored) == H5T_INTEGER;
  H5Tclose(stored);
  if (!is_integer)
    vd_fail(err, VD_FAILED, "%s does not hold integers", path);
  else if (H5Sget_simple_extent_npoints(space) != (hssize_t)n)
    vd_fail(err, VD_FAILED, "%s has another shape than expected", path);
  else if (H5Dread(id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, out) < 0)
    vd_h5_fail(err, "cannot read %s", path);
  H5Sclose(space);
  H5Dclose(id);
  return err->status;
}

int vd_vocabulary_read(hid_t file, vd_vocabulary *v, vd_error *err) {
  hid_t id;
  if (vd_h5_open_dataset(file, "/vocabulary/symbol", &id, err)) return err->status;
  hid_t space = H5Dget_space(id);
  hsize_t shape[2] = {0, 0};
  if (H5Sget_simple_extent_ndims(space) == 2) H5Sget_simple_extent_dims(space, shape, NULL);
  H5Sclose(space);
  H5Dclose(id);
  if (shape[0] < 1 || shape[0] > 65536 || shape[1] < 1 || shape[1] > VD_LONGEST_SYMBOL)
    return vd_fail(err, VD_FAILED, "/vocabulary/symbol has an impossible shape");
  v->n = (int64_t)shape[0];
  v->width = (int64_t)shape[1];
  v->symbol = vd_calloc(shape[0], shape[1]);
  v->length = vd_calloc(shape[0], sizeof *v->length);
  v->count = vd_calloc(shape[0], sizeof *v->count);
  if (read_whole(file, "/vocabulary/symbol", H5T_NATIVE_UINT8, shape[0] * shape[1], v->symbol, err) ||
      read_whole(file, "/vocabulary/length", H5T_NATIVE_INT32, shape[0], v->length, err) ||
      read_whole(file, "/vocabulary/count", H5T_NATIVE_INT64, shape[0], v->count, err))
    return err->status;
  for (int64_t i = 0; i < v->n; i++)
    if (v->length[i] < 1 || v->length[i] > v->width)
      return vd_fail(err, VD_FAILED, "symbol %lld has an impossible length", (long long)i);
  for (int64_t i = 0; i < v->n; i++)
    if (v->count[i] < 0) return vd_fail(err, VD_FAILED, "symbol %lld has a negative count", (long long)i);
  return VD_OK;
}

void vd_vocabulary_free(vd_vocabulary *v) {
  free(v->symbol);
  free(v->length);
  free(v->count);
  *v = (vd_vocabulary){0};
}

int64_t vd_vocabulary_find(const vd_vocabulary *v, const uint8_t *symbol, int64_t n) {
  for (int64_t i = 0; i < v->n; i++)
    if (v->length[i] == n && memcmp(v->symbol + i * v->width, symbol, (size_t)n) == 0) return i;
  return -1;
}

int vd_vocabulary_map(const vd_vocabulary *from, const vd_vocabulary *to, int32_t *map, vd_error *err) {
  enum { NAMED = 8 };
  char names[NAMED * 48] = "";
  int64_t missing = 0;
  for (int64_t i = 0; i < from->n; i++) {
    const uint8_t *symbol = from->symbol + i * from->width;
    map[i] = (int32_t)vd_vocabulary_find(to, symbol, from->length[i]);
    if (map[i] >= 0 || from->count[i] == 0 || missing++ >= NAMED) continue;
    size_t used = strlen(names);
    used += (size_t)snprintf(names + used, sizeof names - used, "%s'", used ? ", " : "");
    for (int32_t k = 0; k < from->length[i] && k < 8; k++)
      used += (size_t)snprintf(names + used, sizeof names - used, symbol[k] >= 33 && symbol[k] < 127 ? "%c" : "\\x%02x",
                               symbol[k]);
    snprintf(names + used, sizeof names - used, "'");
  }
  if (missing == 0) return VD_OK;
  return vd_fail(err, VD_USAGE, "%lld symbols are not in the model's vocabulary: %s%s", (long long)missing, names,
                 missing > NAMED ? ", ..." : "");
}
