#include "tests/unit/corpus_maker.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int32_t maker_token(int split, int64_t i, int64_t vocab) {
  return (int32_t)((i / 37 + i / 1009 + 11 * split) % vocab);
}

static void make_vocabulary(vd_vocabulary *v, int64_t vocab) {
  v->n = vocab;
  v->width = vocab <= 256 ? 1 : 8;
  v->symbol = vd_calloc((size_t)vocab, (size_t)v->width);
  v->length = vd_calloc((size_t)vocab, sizeof *v->length);
  v->count = vd_calloc((size_t)vocab, sizeof *v->count);
  for (int64_t s = 0; s < vocab; s++) {
    char text[32];
    int n = snprintf(text, sizeof text, "s%lld", (long long)s);
    if (vocab <= 256) text[0] = (char)s, n = 1;
    memcpy(v->symbol + s * v->width, text, (size_t)n);
    v->length[s] = n;
    v->count[s] = s;
  }
}

static int write_split(vd_h5 *h5, const vd_corpus_plan *plan, int k, vd_error *err) {
  enum { PART = 50000 };
  uint16_t *part = vd_calloc(PART, sizeof *part);
  uint8_t *narrow = vd_calloc(PART, sizeof *narrow);
  for (int64_t i = 0; i < vd_shard_count(plan->n_token[k], plan->shard_tokens) && err->status == VD_OK; i++) {
    vd_shard *shard;
    int64_t at = i * plan->shard_tokens;
    if (vd_shard_begin(&shard, h5, plan, k, i, err)) break;
    while (vd_shard_wants(shard) > 0 && err->status == VD_OK) {
      int64_t n = vd_shard_wants(shard) < PART ? vd_shard_wants(shard) : PART;
      for (int64_t j = 0; j < n; j++) {
        part[j] = (uint16_t)maker_token(k, at + j, plan->vocabulary.n);
        narrow[j] = (uint8_t)part[j];
      }
      vd_shard_put(shard, vd_corpus_token_bytes(plan) == 1 ? (const void *)narrow : part, n, err);
      at += n;
    }
    if (err->status)
      vd_shard_abandon(&shard);
    else
      vd_shard_commit(&shard, err);
  }
  free(part);
  free(narrow);
  return err->status;
}

int maker_write(vd_h5 *h5, const char *path, const int64_t n[VD_N_SPLIT], int64_t shard_tokens, int deflate,
                int64_t vocab, vd_error *err) {
  vd_corpus_plan plan = {.path = path,
                         .shard_tokens = shard_tokens,
                         .deflate = deflate,
                         .n_source = 1,
                         .source = {"made"},
                         .origin = {.settings = "&run /"}};
  plan.words = vocab > 256;
  snprintf(plan.id, sizeof plan.id, "%016llx%016llx", (unsigned long long)n[0], (unsigned long long)vocab);
  snprintf(plan.split_rule, sizeof plan.split_rule, "made");
  memcpy(plan.n_token, n, sizeof plan.n_token);
  make_vocabulary(&plan.vocabulary, vocab);
  for (int k = 0; k < VD_N_SPLIT && err->status == VD_OK; k++) write_split(h5, &plan, k, err);
  if (err->status == VD_OK) vd_corpus_write(h5, &plan, err);
  free(plan.vocabulary.symbol);
  free(plan.vocabulary.length);
  free(plan.vocabulary.count);
  return err->status;
}

bool maker_flip(const char *path, long at, int bit) {
  FILE *f = fopen(path, "r+b");
  if (!f) return false;
  int c = fseek(f, at, SEEK_SET) == 0 ? fgetc(f) : EOF;
  if (c != EOF) {
    fseek(f, at, SEEK_SET);
    fputc(c ^ (1 << bit), f);
  }
  fclose(f);
  return c != EOF;
}

void maker_remove(const char *folder) {
  DIR *dir = opendir(folder);
  for (struct dirent *e; dir && (e = readdir(dir)) != NULL;) unlinkat(dirfd(dir), e->d_name, 0);
  if (dir) closedir(dir);
  rmdir(folder);
}
