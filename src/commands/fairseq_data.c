#include "src/base/regular_file.h"
#include "src/commands/vocabulary.h"
#include "src/deck/settings.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* NAME.idx: magic, version (8 bytes), type (1), number n of items (8), n lengths in tokens (4), n places in NAME.bin in
 * bytes (8). All little-endian. */
enum { HEADER = 26, ENTRIES = 4096 /* of the index, read at once */ };

static const char magic[9] = "MMIDIDX\0", older_magic[8] = "TNTIDX\0";
static const char *const special[] = {"<s>", "<pad>", "</s>", "<unk>"}; /* before the lines of dict.txt */
enum { N_SPECIAL = sizeof special / sizeof *special };

/* Bytes of a token by the type in the index; 0: no integers. */
static const int width_of[] = {0, 1, 1, 2, 4, 8, 0, 0, 2, 4, 8};

static uint64_t number(const uint8_t *bytes, int n) {
  uint64_t value = 0;
  for (int i = 0; i < n; i++) value |= (uint64_t)bytes[i] << 8 * i;
  return value;
}

void vd_fairseq_beside(const char *path, const char *name, char *beside, size_t size) {
  const char *slash = strrchr(path, '/');
  size_t n = strcmp(name, ".idx") == 0 ? strlen(path) - 4 : slash ? (size_t)(slash + 1 - path) : 0;
  snprintf(beside, size, "%.*s%s", (int)n, path, name);
}

bool vd_fairseq_is(const char *path) {
  char beside[2 * VD_PATH];
  struct stat st;
  size_t n = strlen(path);
  if (n < 4 || strcmp(path + n - 4, ".bin") != 0) return false;
  vd_fairseq_beside(path, ".idx", beside, sizeof beside);
  return stat(beside, &st) == 0;
}

/* Reads exactly n bytes; `file` names them in the error. */
static int read_whole(vd_source_file *source, const char *file, uint8_t *to, int64_t n, vd_error *err) {
  for (int64_t got = 1; n > 0; n -= got, to += got) {
    if (vd_source_read(source, to, n, &got, err)) return err->status;
    if (got == 0) return vd_fail(err, VD_FAILED, "%s is not whole", file);
  }
  return VD_OK;
}

static int check_header(const char *idx, const uint8_t *header, int64_t size, int *width, vd_error *err) {
  if (memcmp(header, older_magic, sizeof older_magic) == 0)
    return vd_fail(err, VD_FAILED, "%s is an index of fairseq's older formats: make the data with --dataset-impl mmap",
                   idx);
  if (memcmp(header, magic, sizeof magic) != 0 || number(header + 9, 8) != 1)
    return vd_fail(err, VD_FAILED, "%s is no index of fairseq's mmap format, version 1", idx);
  unsigned type = header[17];
  *width = type < sizeof width_of / sizeof *width_of ? width_of[type] : 0;
  if (*width == 0) return vd_fail(err, VD_FAILED, "%s: tokens of type %u, which is no type of integers", idx, type);
  uint64_t n = number(header + 18, 8);
  if (n > INT64_MAX / 12 || size != HEADER + 12 * (int64_t)n)
    return vd_fail(err, VD_FAILED, "%s has %lld bytes, which %llu items do not have: it is damaged, or not fairseq's",
                   idx, (long long)size, (unsigned long long)n);
  return VD_OK;
}

/* The items must lie in the .bin file one after the other, and fill it. */
static int check_items(const char *path, const char *idx, vd_source_file *lengths, vd_source_file *places, int64_t n,
                       int width, vd_error *err) {
  static const char disorder[] = "%s: item %lld does not begin in the .bin file where the one before ends";
  uint8_t *length = vd_calloc(ENTRIES, 4), *place = vd_calloc(ENTRIES, 8);
  uint64_t end = 0;
  struct stat st;
  if (vd_source_skip(lengths, HEADER, err) == VD_OK) vd_source_skip(places, HEADER + 4 * n, err);
  for (int64_t first = 0, part; first < n && err->status == VD_OK; first += part) {
    part = n - first < ENTRIES ? n - first : ENTRIES;
    if (read_whole(lengths, idx, length, 4 * part, err) || read_whole(places, idx, place, 8 * part, err)) break;
    for (int64_t i = 0; i < part; i++) {
      if (number(place + 8 * i, 8) != end) {
        vd_fail(err, VD_FAILED, disorder, idx, (long long)(first + i));
        break;
      }
      end += number(length + 4 * i, 4) * (uint64_t)width;
    }
  }
  if (err->status == VD_OK && (stat(path, &st) != 0 || (uint64_t)st.st_size != end))
    vd_fail(err, VD_FAILED, "%s is not as long as %s says (%llu bytes): it is not whole", path, idx,
            (unsigned long long)end);
  free(length);
  free(place);
  return err->status;
}

int vd_fairseq_index(const char *path, int *width, vd_error *err) {
  char idx[2 * VD_PATH];
  uint8_t header[HEADER];
  struct stat st = {0};
  vd_source_file *lengths = NULL, *places = NULL;
  vd_fairseq_beside(path, ".idx", idx, sizeof idx);
  if (vd_source_open_plain(&lengths, idx, err) == VD_OK && vd_source_open_plain(&places, idx, err) == VD_OK &&
      read_whole(places, idx, header, HEADER, err) == VD_OK) {
    vd_source_close(places);
    places = NULL;
    if (stat(idx, &st) != 0) st.st_size = 0;
    if (check_header(idx, header, st.st_size, width, err) == VD_OK && vd_source_open_plain(&places, idx, err) == VD_OK)
      check_items(path, idx, lengths, places, (int64_t)number(header + 18, 8), *width, err);
  }
  vd_source_close(lengths);
  vd_source_close(places);
  return err->status;
}

/* ---- dict.txt ---- */

typedef struct symbol {
  const char *name;
  size_t n;
  uint8_t byte; /* the value of the symbol, where symbols are numbers of bytes */
} symbol;

typedef struct dictionary {
  char *text;    /* the file */
  symbol *entry; /* [VD_MAX_VOCABULARY] */
  int64_t n;
} dictionary;

static void add(dictionary *d, const char *name, size_t n) {
  d->entry[d->n++] = (symbol){.name = name, .n = n};
}

/* A line is a symbol, a blank, a count, and perhaps a remark. False where it is not. */
static bool add_line(dictionary *d, const char *line, size_t n) {
  static const char remark[] = " #fairseq:overwrite";
  while (n > 0 && (line[n - 1] == ' ' || line[n - 1] == '\t' || line[n - 1] == '\r')) n--;
  if (n > strlen(remark) && memcmp(line + n - strlen(remark), remark, strlen(remark)) == 0) n -= strlen(remark);
  size_t name = n;
  while (name > 0 && line[name - 1] >= '0' && line[name - 1] <= '9') name--;
  if (name == n || name < 2 || line[name - 1] != ' ' || name - 1 > VD_LONGEST_SYMBOL) return false;
  add(d, line, name - 1);
  return true;
}

static int parse(const char *path, dictionary *d, size_t size, vd_error *err) {
  d->entry = vd_calloc(VD_MAX_VOCABULARY, sizeof *d->entry);
  for (int i = 0; i < N_SPECIAL; i++) add(d, special[i], strlen(special[i]));
  const char *end = d->text + size;
  for (const char *line = d->text; line < end;) {
    const char *stop = memchr(line, '\n', (size_t)(end - line));
    if (!stop) stop = end;
    if (d->n == VD_MAX_VOCABULARY)
      return vd_fail(err, VD_FAILED, "%s has more than %d symbols", path, (int)VD_MAX_VOCABULARY - N_SPECIAL);
    if (!add_line(d, line, (size_t)(stop - line)))
      return vd_fail(err, VD_FAILED, "%s: line %lld is not a symbol and its count", path,
                     (long long)(d->n - N_SPECIAL + 1));
    line = stop + 1;
  }
  return VD_OK;
}

/* Symbols in angle brackets, and those that fairseq fills the dictionary up with. */
static bool is_filler(const symbol *s) {
  static const char filler[] = "madeupword";
  return (s->name[0] == '<' && s->name[s->n - 1] == '>') ||
         (s->n > strlen(filler) && memcmp(s->name, filler, strlen(filler)) == 0);
}

/* In the texts that are made from enwik8 for these programs all symbols are numbers of bytes. */
static bool are_bytes(dictionary *d) {
  bool any = false;
  for (int64_t i = 0; i < d->n; i++) {
    symbol *s = &d->entry[i];
    int value = 0;
    if (is_filler(s)) continue;
    if (s->n > 3) return false;
    for (size_t k = 0; k < s->n; k++) {
      if (s->name[k] < '0' || s->name[k] > '9') return false;
      value = 10 * value + (s->name[k] - '0');
    }
    if (value > 255) return false;
    s->byte = (uint8_t)value;
    any = true;
  }
  return any;
}

static void to_bytes(dictionary *d) {
  for (int64_t i = 0; i < d->n; i++) {
    symbol *s = &d->entry[i];
    bool is_line_end = s->n == 4 && memcmp(s->name, "</s>", 4) == 0;
    if (is_filler(s) && !is_line_end) continue;
    if (is_line_end) s->byte = '\n';
    s->name = (const char *)&s->byte;
    s->n = 1;
  }
}

static int fill(const char *path, const dictionary *d, vd_vocabulary *v, vd_error *err) {
  vd_vocabulary_builder *known = vd_vocabulary_builder_create();
  *v = (vd_vocabulary){.n = d->n, .width = 1};
  for (int64_t i = 0; i < d->n; i++)
    if ((int64_t)d->entry[i].n > v->width) v->width = (int64_t)d->entry[i].n;
  v->symbol = vd_calloc((size_t)v->n, (size_t)v->width);
  v->length = vd_calloc((size_t)v->n, sizeof *v->length);
  v->count = vd_calloc((size_t)v->n, sizeof *v->count);
  for (int64_t i = 0, index; i < v->n; i++) {
    const symbol *s = &d->entry[i];
    if (vd_vocabulary_builder_add(known, s->name, s->n, &index, err)) break;
    if (index != i) {
      vd_fail(err, VD_FAILED, "%s: line %lld has a symbol again that is there already", path,
              (long long)(i - N_SPECIAL + 1));
      break;
    }
    memcpy(v->symbol + i * v->width, s->name, s->n);
    v->length[i] = (int32_t)s->n;
  }
  vd_vocabulary_builder_destroy(known);
  return err->status;
}

int vd_fairseq_vocabulary(const char *path, vd_vocabulary *v, bool *words, vd_error *err) {
  enum { LONGEST_LINE = VD_LONGEST_SYMBOL + 64, LONGEST = VD_MAX_VOCABULARY * LONGEST_LINE };
  char text[2 * VD_PATH];
  dictionary d = {0};
  size_t size = 0;
  *v = (vd_vocabulary){0};
  vd_fairseq_beside(path, "dict.txt", text, sizeof text);
  if (vd_read_regular(text, LONGEST, &d.text, &size, err) == VD_OK && parse(text, &d, size, err) == VD_OK) {
    *words = !are_bytes(&d);
    if (!*words) to_bytes(&d);
    fill(text, &d, v, err);
  }
  free(d.entry);
  free(d.text);
  return err->status;
}
