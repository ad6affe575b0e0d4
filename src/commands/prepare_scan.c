#include "io/digest.h"
#include "src/base/clock.h"
#include "src/base/signals.h"
#include "src/commands/prepare.h"
#include "src/commands/vocabulary.h"
#include "src/train/task_queue.h"

#include <errno.h>
#include <math.h>
#include <nettle/md5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUFFER = 1 << 18, AHEAD = 16 * BUFFER };

void vd_progress_start(vd_progress *p, const char *what) {
  *p = (vd_progress){.what = what, .is_live = isatty(STDOUT_FILENO) == 1, .last = vd_clock_seconds()};
}

void vd_progress_show(vd_progress *p, double fraction) {
  double now = vd_clock_seconds();
  if (!p->what || now - p->last < (p->is_live ? 1 : 30)) return;
  p->last = now;
  p->said = true;
  printf(p->is_live ? "\rviaduct: %s: %3.0f%%" : "viaduct: %s: %3.0f%%\n", p->what, 100 * fraction);
  fflush(stdout);
}

void vd_progress_end(vd_progress *p) {
  if (p->is_live && p->said) printf("\r\033[K");
  p->what = NULL;
}

static void hex(struct md5_ctx *md5, char text[33]) {
  uint8_t digest[MD5_DIGEST_SIZE];
  md5_digest(md5, sizeof digest, digest);
  for (int i = 0; i < MD5_DIGEST_SIZE; i++) snprintf(text + 2 * i, 3, "%02x", digest[i]);
}

/* File i of a source; false: it has no such file. */
static bool file_of(const char *source, int i, char *path, size_t size) {
  static const char *const beside[VD_SOURCE_FILES] = {"", ".idx", "dict.txt"};
  if (i == 0)
    snprintf(path, size, "%s", source);
  else if (vd_fairseq_is(source))
    vd_fairseq_beside(source, beside[i], path, size);
  else
    return false;
  return true;
}

static int stamp_of(const char *source, vd_prepare_stamp *stamp, vd_error *err) {
  char path[2 * VD_PATH];
  struct stat st;
  *stamp = (vd_prepare_stamp){0};
  for (int i = 0; i < VD_SOURCE_FILES && file_of(source, i, path, sizeof path); i++) {
    if (stat(path, &st) != 0) return vd_fail(err, VD_FAILED, "cannot open %s: %s", path, strerror(errno));
    stamp->file[i].size = st.st_size;
    stamp->file[i].changed = st.st_mtim;
  }
  return VD_OK;
}

int vd_prepare_unchanged(const vd_corpus_plan *plan, const vd_prepare_stamp stamp[VD_N_SPLIT], vd_error *err) {
  for (int i = 0; i < plan->n_source; i++) {
    vd_prepare_stamp now;
    if (stamp_of(plan->source[i], &now, err)) return err->status;
    for (int f = 0; f < VD_SOURCE_FILES; f++) {
      char path[2 * VD_PATH];
      const struct timespec *then = &stamp[i].file[f].changed, *last = &now.file[f].changed;
      if (now.file[f].size == stamp[i].file[f].size && last->tv_sec == then->tv_sec && last->tv_nsec == then->tv_nsec)
        continue;
      if (!file_of(plan->source[i], f, path, sizeof path)) snprintf(path, sizeof path, "%s", plan->source[i]);
      return vd_fail(err, VD_FAILED, "%s changed while it was read", path);
    }
  }
  return VD_OK;
}

/* Bytes on their way to the md5. */
struct piece {
  vd_task_queue *queue;
  struct md5_ctx *md5;
  uint8_t *bytes;
  size_t n;
};

static void digest_piece(void *argument, vd_error *err) {
  struct piece *p = argument;
  if (err->status == VD_OK) md5_update(p->md5, p->n, p->bytes);
  vd_task_queue_recycle(p->queue, p->bytes);
  free(p);
}

/* How often each byte value occurs in x [n], n below 2^32. */
static void count_bytes(const uint8_t *x, size_t n, uint32_t count[256]) {
  uint32_t part[4][256] = {{0}}; /* equal bytes in a row would wait for each other's count */
  size_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (size_t k = 0; k < 4; k++) part[k][x[i + k]]++;
  for (; i < n; i++) part[0][x[i]]++;
  for (int s = 0; s < 256; s++) count[s] = part[0][s] + part[1][s] + part[2][s] + part[3][s];
}

/* Reads and counts; the queue's thread computes the md5, which takes twice as long as the rest. */
static int scan_pieces(vd_corpus_plan *plan, vd_source_file *source, vd_task_queue *queue, struct md5_ctx *md5,
                       int64_t count[256], vd_error *err) {
  vd_progress progress;
  vd_progress_start(&progress, "reading the source");
  for (int64_t n = 1; n > 0 && vd_signals_check(err) == VD_OK;) {
    uint32_t here[256];
    uint8_t *bytes = vd_task_queue_buffer(queue, BUFFER);
    if (vd_source_read(source, bytes, BUFFER, &n, err)) {
      vd_task_queue_recycle(queue, bytes);
      break;
    }
    count_bytes(bytes, (size_t)n, here);
    for (int i = 0; i < 256; i++) count[i] += here[i];
    plan->source_bytes[0] += n;
    struct piece *p = vd_calloc(1, sizeof *p);
    *p = (struct piece){.queue = queue, .md5 = md5, .bytes = bytes, .n = (size_t)n};
    vd_task_queue_add(queue, digest_piece, p, BUFFER);
    vd_progress_show(&progress, vd_source_fraction(source));
  }
  vd_progress_end(&progress);
  return vd_task_queue_wait(queue, err);
}

/* md5, size and count of each byte of the whole source. */
static int scan_bytes(vd_corpus_plan *plan, const char **kind, int64_t count[256], vd_error *err) {
  vd_source_file *source;
  vd_task_queue *queue = NULL;
  struct md5_ctx md5;
  if (vd_source_open(&source, plan->source[0], err)) return err->status;
  *kind = vd_source_packing(source);
  md5_init(&md5);
  if (vd_task_queue_create(&queue, AHEAD, err) == VD_OK) scan_pieces(plan, source, queue, &md5, count, err);
  vd_task_queue_destroy(queue);
  hex(&md5, plan->source_md5[0]);
  vd_source_close(source);
  return err->status;
}

static void vocabulary_of_bytes(const int64_t count[256], vd_vocabulary *v) {
  *v = (vd_vocabulary){.width = 1};
  v->symbol = vd_calloc(256, 1);
  v->length = vd_calloc(256, sizeof *v->length);
  v->count = vd_calloc(256, sizeof *v->count);
  for (int byte = 0; byte < 256; byte++) {
    if (count[byte] == 0) continue;
    v->symbol[v->n] = (uint8_t)byte;
    v->length[v->n] = 1;
    v->count[v->n++] = count[byte];
  }
}

/* Lengths of the splits: counts as they are; fractions by their running sum, so that 0.9 + 0.05 + 0.05 leaves no byte
 * over. */
static int split_bytes(vd_corpus_plan *plan, const vd_settings *s, vd_error *err) {
  const double wanted[VD_N_SPLIT] = {s->prepare.train, s->prepare.valid, s->prepare.test};
  int64_t size = plan->source_bytes[0], sum = 0;
  double fractions = 0;
  for (int k = 0; k < VD_N_SPLIT; k++) {
    double before = fractions;
    if (wanted[k] <= 1) fractions += wanted[k];
    plan->n_token[k] = wanted[k] > 1 ? (int64_t)wanted[k]
                                     : (int64_t)(llround(fractions * (double)size) - llround(before * (double)size));
    sum += plan->n_token[k];
  }
  if (size == 0) return vd_fail(err, VD_USAGE, "the source %s is empty", plan->source[0]);
  if (sum > size)
    return vd_fail(
        err, VD_USAGE,
        "the source %s has %lld bytes, but prepare%%train, prepare%%valid and prepare%%test ask for %lld; give "
        "smaller numbers, or fractions of the source: prepare%%train = 0.9, prepare%%valid = 0.05, "
        "prepare%%test = 0.05",
        plan->source[0], (long long)size, (long long)sum);
  if (plan->n_token[0] == 0)
    return vd_fail(err, VD_USAGE, "prepare%%train leaves nothing of %lld bytes", (long long)size);
  snprintf(plan->split_rule, sizeof plan->split_rule,
           "consecutive parts of the source: train %lld, valid %lld, test %lld of %lld bytes",
           (long long)plan->n_token[0], (long long)plan->n_token[1], (long long)plan->n_token[2], (long long)size);
  return VD_OK;
}

static int scan_text(vd_corpus_plan *plan, int k, const char **kind, vd_vocabulary_builder *words, vd_error *err) {
  vd_word_scanner *scanner;
  if (vd_word_scanner_open(&scanner, plan->source[k], err)) return err->status;
  *kind = vd_word_scanner_kind(scanner);
  vd_progress progress;
  vd_progress_start(&progress, plan->source[k]);
  for (;;) {
    const char *word;
    size_t n;
    if (vd_word_scanner_next(scanner, &word, &n, err) || !word || vd_vocabulary_builder_add(words, word, n, NULL, err))
      break;
    if (plan->n_token[k]++ % 65536 == 0) {
      if (vd_signals_check(err)) break;
      vd_progress_show(&progress, vd_source_fraction(vd_word_scanner_source(scanner)));
    }
  }
  vd_progress_end(&progress);
  plan->source_bytes[k] = vd_word_scanner_bytes(scanner);
  hex(vd_word_scanner_md5(scanner), plan->source_md5[k]);
  vd_word_scanner_close(scanner);
  return err->status;
}

static int scan_texts(vd_corpus_plan *plan, const char *kind[VD_N_SPLIT], vd_error *err) {
  vd_vocabulary_builder *words = vd_vocabulary_builder_create();
  for (int k = 0; k < VD_N_SPLIT && err->status == VD_OK; k++) scan_text(plan, k, &kind[k], words, err);
  if (err->status == VD_OK && plan->n_token[0] == 0) vd_fail(err, VD_USAGE, "the text %s is empty", plan->source[0]);
  if (err->status == VD_OK) vd_vocabulary_builder_sorted(words, &plan->vocabulary);
  vd_vocabulary_builder_destroy(words);
  snprintf(plan->split_rule, sizeof plan->split_rule, "one %s for each split; %s ends every line",
           vd_fairseq_is(plan->source[0]) ? "binary file of fairseq's" : "text", plan->words ? "</s>" : "a newline");
  return err->status;
}

/* The same tokens in the same splits have the same id, whatever the shards are like. Ids of another vocabulary than the
 * source's own are other tokens. */
static void identify(vd_corpus_plan *plan, bool other_vocabulary) {
  struct md5_ctx md5;
  md5_init(&md5);
  char text[128];
  for (int i = 0; i < plan->n_source; i++) {
    snprintf(text, sizeof text, "%s %s\n", plan->words ? "words" : "bytes", plan->source_md5[i]);
    md5_update(&md5, strlen(text), (const uint8_t *)text);
  }
  for (int k = 0; k < VD_N_SPLIT; k++) {
    snprintf(text, sizeof text, "%lld\n", (long long)plan->n_token[k]);
    md5_update(&md5, strlen(text), (const uint8_t *)text);
  }
  const vd_vocabulary *v = &plan->vocabulary;
  for (int64_t i = 0; other_vocabulary && i < v->n; i++) {
    md5_update(&md5, sizeof v->length[i], (const uint8_t *)&v->length[i]);
    md5_update(&md5, (size_t)v->length[i], v->symbol + i * v->width);
  }
  hex(&md5, plan->id);
}

void vd_prepare_name_sources(const vd_settings *s, vd_corpus_plan *plan) {
  plan->source[0] = plan->n_source > 1 ? s->prepare.train_text : s->prepare.source;
  plan->source[1] = s->prepare.valid_text;
  plan->source[2] = s->prepare.test_text;
}

int vd_prepare_sources(const vd_settings *s, vd_corpus_plan *plan, vd_prepare_stamp stamp[VD_N_SPLIT], vd_error *err) {
  plan->words = s->prepare.source[0] == '\0';
  plan->n_source = plan->words ? VD_N_SPLIT : 1;
  vd_prepare_name_sources(s, plan);
  for (int i = 0; i < plan->n_source; i++) {
    vd_source_file *source = NULL;
    vd_word_scanner *scanner = NULL;
    if (stamp_of(plan->source[i], &stamp[i], err)) return err->status;
    if (plan->n_source > 1)
      vd_word_scanner_open(&scanner, plan->source[i], err);
    else
      vd_source_open(&source, plan->source[i], err);
    vd_word_scanner_close(scanner);
    vd_source_close(source);
    if (err->status) return err->status;
  }
  if (plan->words && vd_fairseq_is(plan->source[0])) {
    vd_vocabulary v;
    vd_fairseq_vocabulary(plan->source[0], &v, &plan->words, err);
    vd_vocabulary_free(&v);
  }
  return err->status;
}

/* The vocabulary of a corpus or a checkpoint. */
static int read_vocabulary(vd_h5 *h5, const char *path, vd_vocabulary *v, vd_error *err) {
  char *kind = NULL;
  hid_t file;
  if (vd_digest_check(path, NULL, err)) return err->status;
  vd_h5_lock(h5);
  if (vd_h5_open(path, NULL, &file, err) == VD_OK) {
    if (vd_h5_get_text(file, "viaduct_kind", &kind, err) == VD_OK && strcmp(kind, "corpus") != 0 &&
        strcmp(kind, "checkpoint") != 0)
      vd_fail(err, VD_FAILED, "%s is a %s: a corpus or a checkpoint holds a vocabulary", path, kind);
    if (err->status == VD_OK) vd_vocabulary_read(file, v, err);
    free(kind);
    H5Fclose(file);
  }
  vd_h5_unlock(h5);
  return vd_wrap(err, "prepare%%vocabulary");
}

static void all_bytes(vd_vocabulary *v) {
  *v = (vd_vocabulary){.n = 256,
                       .width = 1,
                       .symbol = vd_calloc(256, 1),
                       .length = vd_calloc(256, sizeof *v->length),
                       .count = vd_calloc(256, sizeof *v->count)};
  for (int byte = 0; byte < 256; byte++) {
    v->symbol[byte] = (uint8_t)byte;
    v->length[byte] = 1;
  }
}

/* The vocabulary is that of dict.txt, with symbols that do not occur. */
static bool has_dictionary(const vd_corpus_plan *plan) {
  return plan->n_source > 1 && vd_fairseq_is(plan->source[0]);
}

/* prepare%vocabulary: the symbols found in the source become those of another vocabulary, which must have them all. */
static int choose_vocabulary(vd_corpus_plan *plan, const vd_settings *s, vd_h5 *h5, vd_error *err) {
  const char *chosen = s->prepare.vocabulary;
  vd_vocabulary *found = &plan->vocabulary, taken = {0};
  bool words;
  if (strcmp(chosen, "found") == 0) {
    if (!has_dictionary(plan)) return VD_OK;
    if (vd_fairseq_vocabulary(plan->source[0], &taken, &words, err)) {
      vd_vocabulary_free(&taken);
      return err->status;
    }
  } else if (strcmp(chosen, "bytes") == 0) {
    if (plan->words)
      return vd_fail(err, VD_USAGE, "prepare%%vocabulary = 'bytes' is for raw bytes, not for texts of words");
    all_bytes(&taken);
  } else if (read_vocabulary(h5, chosen, &taken, err)) {
    vd_vocabulary_free(&taken);
    return err->status;
  }
  int32_t *map = vd_calloc((size_t)found->n, sizeof *map);
  if (vd_vocabulary_map(found, &taken, map, err) == VD_OK) {
    memset(taken.count, 0, (size_t)taken.n * sizeof *taken.count);
    for (int64_t i = 0; i < found->n; i++) taken.count[map[i]] = found->count[i];
    vd_vocabulary_free(found);
    *found = taken;
  } else {
    vd_vocabulary_free(&taken);
    vd_wrap(err, "prepare%%vocabulary = '%s'", chosen);
  }
  free(map);
  return err->status;
}

int vd_prepare_scan(vd_corpus_plan *plan, const vd_settings *s, vd_h5 *h5, const char *kind[VD_N_SPLIT],
                    vd_error *err) {
  if (plan->n_source > 1) {
    scan_texts(plan, kind, err);
  } else {
    int64_t count[256] = {0};
    if (scan_bytes(plan, &kind[0], count, err) == VD_OK && split_bytes(plan, s, err) == VD_OK)
      vocabulary_of_bytes(count, &plan->vocabulary);
  }
  if (err->status == VD_OK && choose_vocabulary(plan, s, h5, err) == VD_OK)
    identify(plan, strcmp(s->prepare.vocabulary, "found") != 0 || has_dictionary(plan));
  return err->status;
}

void vd_prepare_free(vd_corpus_plan *plan) {
  free(plan->vocabulary.symbol);
  free(plan->vocabulary.length);
  free(plan->vocabulary.count);
  plan->vocabulary = (vd_vocabulary){0};
}
