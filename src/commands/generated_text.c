#include "src/commands/generated_text.h"

#include <stdlib.h>
#include <string.h>

static void append(vd_generated_text *t, const char *bytes, size_t n) {
  if (n == 0) return;
  if (t->n + n > t->capacity) {
    size_t capacity = 2 * (t->n + n) + 256;
    char *more = vd_calloc(capacity, 1);
    if (t->n > 0) memcpy(more, t->bytes, t->n);
    free(t->bytes);
    t->bytes = more;
    t->capacity = capacity;
  }
  memcpy(t->bytes + t->n, bytes, n);
  t->n += n;
}

void vd_generated_text_prompt(vd_generated_text *t, const char *bytes, size_t n) {
  append(t, bytes, n);
  t->final = t->from = t->n;
}

/* The end of the text may be the beginning of the stop text: the longest such end stays open. */
static size_t open_end(const vd_generated_text *t, const char *stop, size_t n_stop) {
  size_t most = t->n - t->from < n_stop ? t->n - t->from : n_stop - 1;
  while (most > 0 && memcmp(t->bytes + t->n - most, stop, most) != 0) most--;
  return most;
}

void vd_generated_text_append(vd_generated_text *t, const char *bytes, size_t n, const char *stop, size_t n_stop) {
  if (t->ended) return;
  size_t first = t->final;
  append(t, bytes, n);
  if (n_stop == 0) {
    t->final = t->n;
    return;
  }
  for (size_t at = first; at + n_stop <= t->n; at++) {
    if (memcmp(t->bytes + at, stop, n_stop) != 0) continue;
    t->n = at;
    vd_generated_text_end(t);
    return;
  }
  t->final = t->n - open_end(t, stop, n_stop);
}

void vd_generated_text_end(vd_generated_text *t) {
  t->final = t->n;
  t->ended = true;
}

void vd_generated_text_take(vd_generated_text *t) {
  t->n -= t->final;
  if (t->n > 0) memmove(t->bytes, t->bytes + t->final, t->n);
  t->from = t->from > t->final ? t->from - t->final : 0;
  t->final = 0;
}

void vd_generated_text_free(vd_generated_text *t) {
  free(t->bytes);
  *t = (vd_generated_text){0};
}

static int hexadecimal(char c) {
  static const char digits[] = "0123456789abcdef0123456789ABCDEF";
  const char *at = c ? strchr(digits, c) : NULL;
  return at ? (int)((at - digits) % 16) : -1;
}

int vd_unescape(const char *text, char **bytes, size_t *n, vd_error *err) {
  static const char names[] = "ntr\\", meant[] = "\n\t\r\\";
  char *out = vd_calloc(strlen(text) + 1, 1);
  *n = 0;
  for (const char *c = text; *c; c++) {
    if (*c != '\\') {
      out[(*n)++] = *c;
      continue;
    }
    const char *name = *++c ? strchr(names, *c) : NULL;
    int high = *c == 'x' ? hexadecimal(c[1]) : -1, low = high >= 0 ? hexadecimal(c[2]) : -1;
    if (!name && low < 0) {
      free(out);
      *bytes = NULL;
      return vd_fail(err, VD_USAGE, "'\\%.1s' is no escape: \\n, \\t, \\r, \\xHH are, and \\\\ is a backslash", c);
    }
    out[(*n)++] = name ? meant[name - names] : (char)(16 * high + low);
    if (!name) c += 2;
  }
  *bytes = out;
  return VD_OK;
}
