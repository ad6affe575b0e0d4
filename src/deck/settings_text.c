/* What the table says as text: names and their neighbours, allowed values, the echo, help and doc/INPUT.md. */
#include "src/deck/settings_table.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---- names ---- */

const vd_variable *vd_variable_find(const char *group, const char *name) {
  for (size_t i = 0; i < vd_n_variables; i++)
    if (strcmp(vd_variables[i].group, group) == 0 && strcmp(vd_variables[i].name, name) == 0) return &vd_variables[i];
  return NULL;
}

int vd_edit_distance(const char *a, const char *b) {
  enum { N = 64 };
  int d[N][N], m = (int)strnlen(a, N - 1), n = (int)strnlen(b, N - 1);
  for (int i = 0; i <= m; i++) {
    for (int j = 0; j <= n; j++) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      int best = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
      if (d[i - 1][j] + 1 < best) best = d[i - 1][j] + 1;
      if (d[i][j - 1] + 1 < best) best = d[i][j - 1] + 1;
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && d[i - 2][j - 2] + 1 < best)
        best = d[i - 2][j - 2] + 1;
      d[i][j] = best;
    }
  }
  return d[m][n];
}

/* A wrong group counts one edit whatever its name: lr in &model is more likely optimizer%lr than any model%... */
const vd_variable *vd_variable_nearest(const char *group, const char *name) {
  const vd_variable *best = &vd_variables[0];
  int least = INT_MAX;
  for (size_t i = 0; i < vd_n_variables; i++) {
    int wrong_group = strcmp(group, vd_variables[i].group) != 0;
    int distance = 2 * vd_edit_distance(name, vd_variables[i].name) + 2 * wrong_group;
    if (distance >= least) continue;
    least = distance;
    best = &vd_variables[i];
  }
  return best;
}

const char *vd_group_nearest(const char *name) {
  const char *best = vd_groups[0].name;
  int least = INT_MAX;
  for (size_t i = 0; i < vd_n_groups; i++) {
    int distance = vd_edit_distance(name, vd_groups[i].name);
    if (distance >= least) continue;
    least = distance;
    best = vd_groups[i].name;
  }
  return best;
}

/* ---- what a variable may be ---- */

/* Appends to a string in out [n]; what does not fit is cut. */
static void append(char *out, size_t n, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void append(char *out, size_t n, const char *format, ...) {
  size_t used = strlen(out);
  va_list args;
  va_start(args, format);
  vsnprintf(out + used, n - used, format, args);
  va_end(args);
}

static void allowed_range(const vd_variable *v, char *out, size_t n) {
  bool low = v->min > -HUGE_VAL, high = v->max < HUGE_VAL;
  if (low)
    append(out, n, " %s %.16g", v->min_open ? "greater than" : high && !v->max_open ? "from" : "at least", v->min);
  if (!high) return;
  if (low && !v->min_open && !v->max_open)
    append(out, n, " to %.16g", v->max);
  else
    append(out, n, "%s %s %.16g", low ? " and" : "", v->max_open ? "less than" : "at most", v->max);
}

void vd_variable_allowed(const vd_variable *v, char *out, size_t n) {
  out[0] = 0;
  if (v->type == VD_LOGICAL) {
    append(out, n, ".true. or .false.");
  } else if (v->type == VD_CHOICE) {
    size_t length;
    for (const char *p = v->choices; *p; p += length + (p[length] == ' ')) {
      length = strcspn(p, " ");
      const char *before = p == v->choices ? "" : p[length] ? ", " : " or ";
      append(out, n, "%s'%.*s'", before, (int)length, p);
    }
  } else if (v->type == VD_STRING) {
    append(out, n, "a string in quotes, of at most %zu bytes", v->size - 1);
  } else {
    append(out, n, v->type == VD_INTEGER ? "an integer" : "a real");
    allowed_range(v, out, n);
  }
}

/* The shortest decimal that reads back the same, with a point or exponent in it. */
static void write_real(double x, char *out, size_t n) {
  for (int digits = 1; digits <= 17; digits++) {
    snprintf(out, n, "%.*g", digits, x);
    if (strtod(out, NULL) == x) break;
  }
  if (!strpbrk(out, ".e")) append(out, n, ".0");
}

/* Where the word of a choice begins; it ends with a blank or the string. */
static const char *choice_word(const vd_variable *v, const vd_settings *s) {
  int number;
  memcpy(&number, (const char *)s + v->offset, sizeof number);
  const char *p = v->choices;
  for (; number > 0 && *p; number--) p += strcspn(p, " ") + 1;
  return p;
}

void vd_variable_value(const vd_variable *v, const vd_settings *s, char *out, size_t n) {
  const char *at = (const char *)s + v->offset;
  if (v->type == VD_INTEGER) {
    int64_t whole;
    memcpy(&whole, at, sizeof whole);
    snprintf(out, n, "%" PRId64, whole);
  } else if (v->type == VD_REAL) {
    double x;
    memcpy(&x, at, sizeof x);
    write_real(x, out, n);
  } else if (v->type == VD_LOGICAL) {
    bool b;
    memcpy(&b, at, sizeof b);
    snprintf(out, n, b ? ".true." : ".false.");
  } else if (v->type == VD_CHOICE) {
    snprintf(out, n, "'%.*s'", (int)strcspn(choice_word(v, s), " "), choice_word(v, s));
  } else {
    size_t o = 0;
    out[o++] = '\'';
    for (const char *p = at; *p && o + 4 < n; p++) {
      if (*p == '\'') out[o++] = '\'';
      out[o++] = *p;
    }
    out[o++] = '\'';
    out[o] = 0;
  }
}

/* ---- echo ---- */

char *vd_settings_echo(const vd_settings *s) {
  size_t n = 4096;
  for (size_t i = 0; i < vd_n_variables; i++)
    n += 64 + (vd_variables[i].type == VD_STRING ? 2 * vd_variables[i].size : 32);
  char *text = vd_calloc(n, 1), value[2 * VD_PATH + 3];
  size_t used = 0;
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    bool first = i == 0 || strcmp(vd_variables[i - 1].group, v->group) != 0;
    bool last = i + 1 == vd_n_variables || strcmp(vd_variables[i + 1].group, v->group) != 0;
    vd_variable_value(v, s, value, sizeof value);
    if (first) used += (size_t)snprintf(text + used, n - used, "&%s\n", v->group);
    used += (size_t)snprintf(text + used, n - used, "  %s = %s\n", v->name, value);
    if (last) used += (size_t)snprintf(text + used, n - used, "/\n");
  }
  return text;
}
