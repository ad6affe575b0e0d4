/* From the values of a deck to elements of arrays and to numbers. */
#include "src/deck/namelist.h"

#include "src/deck/namelist_chars.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- which value goes into which element ---- */

/* Where an assignment starts, ends and how it steps, in elements from 1 of an array of `size`. */
typedef struct range {
  int64_t first, last, stride;
} range;

static int find_range(const vd_deck *deck, const vd_deck_assignment *a, int64_t size, range *out, vd_error *err) {
  if (size == 0) {
    if (a->subscript) return vd_deck_fail(deck, a->at, err, "%s is a single value and takes no subscript", a->name);
    *out = (range){1, 1, 1};
    return VD_OK;
  }
  *out = (range){a->first, size, a->stride};
  if (a->section && !a->open_last) out->last = a->last;
  if (out->first < 1 || out->first > size || out->last < 1 || out->last > size)
    return vd_deck_fail(deck, a->at, err, "a subscript of %s is out of range: it has elements 1 to %lld", a->name,
                        (long long)size);
  if (out->stride > 0 ? out->first > out->last : out->first < out->last)
    return vd_deck_fail(deck, a->at, err, "the section of %s is empty", a->name);
  return VD_OK;
}

/* Lays one assignment's values over the slots. *failed: the place of an error. */
static int place_values(const vd_deck *deck, const vd_deck_assignment *a, int64_t size, const vd_deck_value **slots,
                        vd_deck_place *failed, vd_error *err) {
  range g = {1, 1, 1};
  *failed = a->at;
  if (find_range(deck, a, size, &g, err)) return err->status;
  int64_t element = g.first, left = (g.last - g.first) / g.stride + 1;
  for (size_t i = 0; i < a->n_value; i++) {
    const vd_deck_value *v = &deck->values[a->value0 + i];
    if (v->repeat > left) {
      *failed = v->at;
      return vd_deck_fail(deck, v->at, err, "too many values for %s: it takes %s", a->name,
                          size == 0 ? "one" : "no more from here on");
    }
    left -= v->repeat;
    for (int64_t k = 0; k < v->repeat; k++, element += g.stride) {
      if (v->null) continue;
      const vd_deck_value *old = slots[element - 1];
      if (old)
        return vd_deck_fail(deck, a->at, err, "%s is assigned a second time (first in line %d)", a->name, old->at.line);
      slots[element - 1] = v;
    }
  }
  return VD_OK;
}

int vd_deck_resolve(const vd_deck *deck, const vd_deck_group *group, const char *name, int64_t size,
                    const vd_deck_value **slots, vd_deck_place *at, vd_error *err) {
  vd_deck_place failed;
  *at = (vd_deck_place){0, 0};
  for (int64_t i = 0; i < (size > 0 ? size : 1); i++) slots[i] = NULL;
  for (size_t i = 0; i < group->n_assignment; i++) {
    const vd_deck_assignment *a = &deck->assignments[group->assignment0 + i];
    if (strcmp(a->name, name) != 0) continue;
    if (at->line == 0) *at = a->at;
    if (place_values(deck, a, size, slots, &failed, err)) {
      *at = failed;
      return err->status;
    }
  }
  return VD_OK;
}

/* ---- numbers ---- */

/* Is text [n] the word, in any case? */
static bool is_word(const char *text, size_t n, const char *word) {
  if (n != strlen(word)) return false;
  for (size_t i = 0; i < n; i++)
    if (lower(text[i]) != word[i]) return false;
  return true;
}

enum vd_deck_outcome vd_deck_integer(const vd_deck_value *value, int64_t *out) {
  size_t i = value->length > 0 && (value->text[0] == '+' || value->text[0] == '-');
  bool negative = i == 1 && value->text[0] == '-';
  int64_t sum = 0;
  if (value->null || value->quoted || i == value->length) return VD_DECK_TYPE;
  for (size_t k = i; k < value->length; k++)
    if (!is_digit(value->text[k])) return VD_DECK_TYPE;
  for (; i < value->length; i++) { /* downwards, since the smallest integer has no positive twin */
    if (__builtin_mul_overflow(sum, (int64_t)10, &sum) || __builtin_sub_overflow(sum, value->text[i] - '0', &sum))
      return VD_DECK_OVERFLOW;
  }
  if (!negative && sum == INT64_MIN) return VD_DECK_OVERFLOW;
  *out = negative ? sum : -sum;
  return VD_DECK_OK;
}

/* inf, infinity, nan, nan(...), without the sign. */
static bool special(const char *text, size_t n, double *out) {
  if (is_word(text, n, "inf") || is_word(text, n, "infinity"))
    *out = INFINITY;
  else if (is_word(text, n, "nan") || (n >= 5 && is_word(text, 4, "nan(") && text[n - 1] == ')'))
    *out = NAN;
  else
    return false;
  return true;
}

/* Copies a Fortran number as C writes it; false where it is none. out holds n + 2. */
static bool rewrite(const char *text, size_t n, char *out) {
  size_t i = 0, o = 0, digits = 0;
  if (i < n && (text[i] == '+' || text[i] == '-')) out[o++] = text[i++];
  for (; i < n && is_digit(text[i]); digits++) out[o++] = text[i++];
  if (i < n && text[i] == '.') {
    out[o++] = text[i++];
    for (; i < n && is_digit(text[i]); digits++) out[o++] = text[i++];
  }
  if (digits == 0) return false;
  if (i < n) {
    char c = lower(text[i]);
    if (c == 'e' || c == 'd' || c == 'q')
      i++;
    else if (c != '+' && c != '-')
      return false;
    out[o++] = 'e';
    if (i < n && (text[i] == '+' || text[i] == '-')) out[o++] = text[i++];
    if (i == n) return false;
    while (i < n && is_digit(text[i])) out[o++] = text[i++];
  }
  out[o] = 0;
  return i == n;
}

enum vd_deck_outcome vd_deck_real(const vd_deck_value *value, double *out) {
  if (value->null || value->quoted || value->length == 0) return VD_DECK_TYPE;
  size_t sign = value->text[0] == '+' || value->text[0] == '-';
  double x;
  if (special(value->text + sign, value->length - sign, &x)) {
    *out = value->text[0] == '-' ? -x : x;
    return VD_DECK_OK;
  }
  char *c = vd_calloc(value->length + 2, 1);
  bool number = rewrite(value->text, value->length, c);
  if (number) x = strtod(c, NULL);
  free(c);
  if (!number) return VD_DECK_TYPE;
  if (!isfinite(x)) return VD_DECK_OVERFLOW;
  *out = x;
  return VD_DECK_OK;
}

enum vd_deck_outcome vd_deck_logical(const vd_deck_value *value, bool *out) {
  const char *t = value->text;
  size_t n = value->length;
  if (value->null || value->quoted || n == 0) return VD_DECK_TYPE;
  if (t[0] == '.') {
    t++, n--;
    if (n > 0 && t[n - 1] == '.') n--;
  }
  if (is_word(t, n, "t") || is_word(t, n, "true"))
    *out = true;
  else if (is_word(t, n, "f") || is_word(t, n, "false"))
    *out = false;
  else
    return VD_DECK_TYPE;
  return VD_DECK_OK;
}
