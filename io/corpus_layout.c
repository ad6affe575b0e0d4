#include "io/corpus_layout.h"

#include "io/atomic_file.h"

#include <ctype.h>
#include <stdio.h>
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
