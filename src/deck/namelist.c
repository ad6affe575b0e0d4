/* The namelist parser: one pass over the text, with as much looking ahead as telling a value from the next name needs.
 */
#include "src/deck/namelist.h"

#include "src/deck/namelist_chars.h"
#include "src/deck/namelist_encoding.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REPEAT_MAX = 200000000 /* gfortran's own limit */ };

typedef struct reader {
  vd_deck *deck;
  const char *text;
  size_t length, pos;
  size_t string;      /* where the last string begins, behind its quote */
  int line, column;   /* of text[pos] */
  size_t pool_used;   /* bytes of deck->pool */
  size_t capacity[3]; /* of groups, assignments, values */
  vd_deck_place failed;
  vd_error *err; /* of what is being parsed; cleared when the parser takes up again behind it */
} reader;

/* ---- characters ---- */

static int at(const reader *r, size_t pos) {
  return pos < r->length ? (unsigned char)r->text[pos] : -1;
}
static int peek(const reader *r) {
  return at(r, r->pos);
}
static vd_deck_place here(const reader *r) {
  return (vd_deck_place){r->line, r->column};
}

static void advance(reader *r) {
  int c = peek(r);
  r->pos++;
  if (c == '\n' || (c == '\r' && peek(r) != '\n')) {
    r->line++;
    r->column = 1;
  } else if ((peek(r) & 0xC0) != 0x80 || peek(r) < 0) {
    r->column++; /* the bytes that continue a UTF-8 character take no column of their own */
  }
}

/* First position from pos on that is neither white space nor part of a comment. */
static size_t after_blank(const reader *r, size_t pos) {
  for (; is_space(at(r, pos)) || at(r, pos) == '!'; pos++)
    if (at(r, pos) == '!')
      while (pos < r->length && !is_line_end(at(r, pos))) pos++;
  return pos < r->length ? pos : r->length;
}

static void skip_to(reader *r, size_t pos) {
  while (r->pos < pos) advance(r);
}
static void skip_blank(reader *r) {
  skip_to(r, after_blank(r, r->pos));
}

static int fail(reader *r, vd_deck_place place, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int fail(reader *r, vd_deck_place place, const char *format, ...) {
  char message[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  r->failed = place;
  return vd_deck_fail(r->deck, place, r->err, "%s", message);
}

/* vd_lookalike of the character at pos; NULL in the middle of a character. */
static const char *lookalike_at(const reader *r, size_t pos) {
  bool inside = pos > 0 && (at(r, pos) & 0xC0) == 0x80 && at(r, pos - 1) >= 0x80;
  return inside ? NULL : vd_lookalike(r->text + pos, r->length - pos);
}

/* What stands at the reader's position, for messages: a word in quotes, "the end of the text" and so on. */
static const char *found(const reader *r, char out[64]) {
  int c = peek(r);
  size_t n = 0;
  if (c < 0) return "the end of the text";
  const char *lookalike = lookalike_at(r, r->pos);
  if (lookalike) return lookalike;
  while (n < 30 && !is_end(at(r, r->pos + n)) && at(r, r->pos + n) >= 32 && at(r, r->pos + n) != 127) n++;
  if (n == 0 && (c < 32 || c == 127)) {
    snprintf(out, 64, "the control character %d", c);
  } else {
    if (n == 0) n = 1;
    while (n > 1 && (at(r, r->pos + n) & 0xC0) == 0x80 && at(r, r->pos + n) >= 0) n--; /* no half of a character */
    snprintf(out, 64, "\"%.*s\"", (int)n, r->text + r->pos);
  }
  return out;
}

/* ---- growing arrays and the pool ---- */

static void *grown(void *array, size_t count, size_t *capacity, size_t size) {
  if (count < *capacity) return array;
  size_t wider = *capacity ? 2 * *capacity : 16;
  char *copy = vd_calloc(wider, size);
  if (count > 0) memcpy(copy, array, count * size);
  free(array);
  *capacity = wider;
  return copy;
}

/* The pool was made as large as all texts together can get, so that it never moves. */
static const char *pooled(reader *r, size_t pos, size_t n, bool fold) {
  char *copy = r->deck->pool + r->pool_used;
  for (size_t i = 0; i < n; i++) copy[i] = (char)(fold ? lower(at(r, pos + i)) : at(r, pos + i));
  copy[n] = 0;
  r->pool_used += n + 1;
  return copy;
}

static vd_deck_value *add_value(reader *r, vd_deck_place place, int64_t repeat) {
  vd_deck *d = r->deck;
  d->values = grown(d->values, d->n_value, &r->capacity[2], sizeof *d->values);
  vd_deck_value *v = &d->values[d->n_value++];
  *v = (vd_deck_value){.repeat = repeat, .null = true, .text = "", .at = place};
  d->assignments[d->n_assignment - 1].n_value++;
  return v;
}

/* ---- names ---- */

static size_t name_end(const reader *r, size_t pos) {
  if (!is_letter(at(r, pos))) return pos;
  while (is_name(at(r, pos))) pos++;
  return pos;
}

/* Does an assignment, NAME = or NAME(...) =, begin at pos? Only then is a word that could be a value a name. */
static bool is_assignment(const reader *r, size_t pos) {
  size_t end = name_end(r, pos);
  if (end == pos) return false;
  if (at(r, end) == '(') {
    do end++; /* stopping at a second parenthesis keeps this linear in the length of the text */
    while (end < r->length && at(r, end) != ')' && at(r, end) != '(' && !is_line_end(at(r, end)));
    if (at(r, end) != ')') return false;
    end++;
  }
  return at(r, after_blank(r, end)) == '=';
}

/* ---- subscripts ---- */

static void skip_inline(reader *r) {
  while (peek(r) == ' ' || peek(r) == '\t') advance(r);
}

/* An optional integer inside the parentheses; *given says whether there was one. */
static int parse_index(reader *r, int64_t *index, bool *given) {
  skip_inline(r);
  vd_deck_place place = here(r);
  vd_deck_value v = {.text = r->text + r->pos};
  size_t begin = r->pos;
  if (peek(r) == '+' || peek(r) == '-') advance(r);
  while (is_digit(peek(r))) advance(r);
  v.length = r->pos - begin;
  *given = v.length > 0;
  if (*given && vd_deck_integer(&v, index) != VD_DECK_OK) return fail(r, place, "a subscript must be an integer");
  return VD_OK;
}

/* (first), (first:last), (first:last:stride), with either bound of a section without stride left out. */
static int parse_subscript(reader *r, vd_deck_assignment *a) {
  vd_deck_place open = here(r);
  bool given, given_last = false, given_stride = false;
  char word[64];
  advance(r);
  a->subscript = true;
  if (parse_index(r, &a->first, &given)) return r->err->status;
  if (peek(r) == ':') {
    a->section = true;
    advance(r);
    if (parse_index(r, &a->last, &given_last)) return r->err->status;
    a->open_last = !given_last;
    if (peek(r) == ':') {
      advance(r);
      if (parse_index(r, &a->stride, &given_stride)) return r->err->status;
      if (!given || !given_last || !given_stride)
        return fail(r, open, "a section with a stride needs both bounds and the stride: %s(1:6:2)", a->name);
      if (a->stride == 0) return fail(r, open, "the stride of a section cannot be 0");
    }
  } else if (!given) {
    return fail(r, here(r), "%s needs a subscript between its parentheses, found %s", a->name, found(r, word));
  }
  if (!a->section) skip_inline(r); /* gfortran takes blanks here, but not behind the bounds of a section */
  if (peek(r) == ',') return fail(r, here(r), "%s has more than one subscript; arrays have one dimension", a->name);
  if (peek(r) != ')')
    return fail(r, here(r), "expected ')' after the subscript of %s, found %s", a->name, found(r, word));
  advance(r);
  return VD_OK;
}

/* ---- values ---- */

/* A quote of a word processor does not close a string: where one stands in its first line it is named. */
static int fail_unclosed(reader *r, vd_deck_place open, int quote) {
  r->line = open.line;
  r->column = open.column + 1;
  for (r->pos = r->string; r->pos < r->length && !is_line_end(peek(r)); advance(r)) {
    const char *lookalike = lookalike_at(r, r->pos);
    if (lookalike && strstr(lookalike, "quote"))
      return fail(r, open, "the string that begins here has no closing %c: in it stands %s", quote, lookalike);
  }
  return fail(r, open, "the string that begins here has no closing %c", quote);
}

/* A quoted string: a doubled quote stands for one, and a line's end inside it is dropped, as gfortran does. */
static int parse_string(reader *r, vd_deck_value *v) {
  vd_deck_place open = here(r);
  int quote = peek(r), c;
  char *out = r->deck->pool + r->pool_used, word[64];
  size_t n = 0;
  advance(r);
  r->string = r->pos;
  while ((c = peek(r)) >= 0) {
    advance(r);
    if (c == quote) {
      if (peek(r) != quote) break;
      advance(r);
    }
    if (!is_line_end(c)) out[n++] = (char)c;
  }
  if (c < 0) return fail_unclosed(r, open, quote);
  if (!is_end(peek(r)))
    return fail(r, here(r), "expected a separator after the string, found %s (a quote inside a string is doubled)",
                found(r, word));
  out[n] = 0;
  r->pool_used += n + 1;
  v->null = false;
  v->quoted = true;
  v->text = out;
  v->length = n;
  return VD_OK;
}

static int parse_word(reader *r, vd_deck_value *v) {
  size_t begin = r->pos, end = begin;
  int c;
  while (!is_end(c = at(r, end))) {
    char word[64];
    bool lookalike = lookalike_at(r, end) != NULL;
    if (c == '\'' || c == '"' || c == '=' || c == '&' || c == '$' || c < 32 || c == 127 || lookalike) {
      skip_to(r, end);
      if (lookalike) return fail(r, here(r), "in a value stands %s", found(r, word));
      return fail(r, here(r), "%s in the middle of a value", found(r, word));
    }
    end++;
  }
  v->null = false;
  v->text = pooled(r, begin, end - begin, false);
  v->length = end - begin;
  skip_to(r, end);
  return VD_OK;
}

/* r*: digits directly followed by a star. *repeat is 1 where there is none. */
static int parse_repeat(reader *r, int64_t *repeat, bool *given) {
  size_t end = r->pos;
  vd_deck_place place = here(r);
  *repeat = 1;
  while (is_digit(at(r, end))) end++;
  *given = end > r->pos && at(r, end) == '*';
  if (!*given) return VD_OK;
  vd_deck_value v = {.text = r->text + r->pos, .length = end - r->pos};
  if (vd_deck_integer(&v, repeat) != VD_DECK_OK || *repeat < 1 || *repeat > REPEAT_MAX)
    return fail(r, place, "a repeat count must be from 1 to %d, found \"%.*s\"", REPEAT_MAX,
                (int)(v.length < 30 ? v.length : 30), v.text);
  skip_to(r, end + 1);
  return VD_OK;
}

static int parse_value(reader *r) {
  vd_deck_place place = here(r);
  int64_t repeat;
  bool given;
  char word[64];
  if (peek(r) == '=') return fail(r, place, "a second '=' where a value was expected");
  if (parse_repeat(r, &repeat, &given)) return r->err->status;
  vd_deck_value *v = add_value(r, place, repeat);
  if (given && is_end(peek(r))) return VD_OK; /* r*: nulls */
  if (peek(r) == '\'' || peek(r) == '"') return parse_string(r, v);
  if (peek(r) < 32 || peek(r) == 127) return fail(r, here(r), "expected a value, found %s", found(r, word));
  return parse_word(r, v);
}

static bool at_group_end(const reader *r) {
  return peek(r) < 0 || peek(r) == '/' || peek(r) == '&' || peek(r) == '$';
}

/* Values up to the next assignment or the end of the group. A separator where a value could stand makes a null. */
static int parse_values(reader *r) {
  bool expected = true;
  for (;;) {
    skip_blank(r);
    if (at_group_end(r)) return VD_OK;
    if (peek(r) == ',' || peek(r) == ';') {
      if (expected) add_value(r, here(r), 1);
      expected = true;
      advance(r);
    } else if (is_assignment(r, r->pos)) {
      return VD_OK;
    } else {
      if (parse_value(r)) return r->err->status;
      expected = false;
    }
  }
}

/* ---- assignments and groups ---- */

static int parse_assignment(reader *r) {
  vd_deck *d = r->deck;
  char word[64];
  size_t end = name_end(r, r->pos);
  if (end == r->pos)
    return fail(r, here(r), "expected the name of a variable, or / to close group &%s, found %s",
                d->groups[d->n_group - 1].name, found(r, word));
  d->assignments = grown(d->assignments, d->n_assignment, &r->capacity[1], sizeof *d->assignments);
  vd_deck_assignment *a = &d->assignments[d->n_assignment++];
  *a = (vd_deck_assignment){.first = 1, .stride = 1, .value0 = d->n_value, .at = here(r)};
  a->name = pooled(r, r->pos, end - r->pos, true);
  d->groups[d->n_group - 1].n_assignment++;
  skip_to(r, end);
  if (peek(r) == '(' && parse_subscript(r, a)) return r->err->status;
  skip_blank(r);
  if (peek(r) == '%') return fail(r, here(r), "a variable inside a group is written without its group: no '%%' here");
  if (peek(r) != '=') return fail(r, here(r), "expected '=' after the variable %s, found %s", a->name, found(r, word));
  advance(r);
  return parse_values(r);
}

/* At / or &end or $end: steps over it. *closed is false where another & or $ stands. */
static void parse_close(reader *r, bool *closed) {
  *closed = true;
  if (peek(r) == '/') {
    advance(r);
    return;
  }
  size_t p = r->pos;
  if (lower(at(r, p + 1)) == 'e' && lower(at(r, p + 2)) == 'n' && lower(at(r, p + 3)) == 'd' && is_end(at(r, p + 4)))
    skip_to(r, p + 4);
  else
    *closed = false;
}

/* ---- taking up again behind an error ---- */

/* Notes the error where there is space for it. */
static void note(reader *r) {
  vd_deck *d = r->deck;
  if (!d->faults) d->faults = vd_calloc(VD_DECK_FAULTS, sizeof *d->faults);
  if (d->n_fault < VD_DECK_FAULTS) d->faults[d->n_fault++] = (vd_deck_fault){r->failed, *r->err};
  *r->err = (vd_error){0};
}

static bool at_group(const reader *r) {
  return (peek(r) == '&' || peek(r) == '$') && is_letter(at(r, r->pos + 1));
}

static void skip_line(reader *r) {
  while (peek(r) >= 0 && !is_line_end(peek(r))) advance(r);
  while (is_space(peek(r))) advance(r);
}

/* Notes the error and skips to the first line behind it that begins with a group, with an assignment, or with the /
 * that closes a group. The text has errors in any case: skipping too much hides some, and taking up again inside a
 * string would at worst name some that are none. */
static void recover(reader *r) {
  note(r);
  do skip_line(r);
  while (peek(r) >= 0 && !at_group(r) && !(peek(r) == '/' && is_end(at(r, r->pos + 1))) && !is_assignment(r, r->pos));
}

/* Notes the error and skips to the next line that begins with a group. */
static void recover_outside(reader *r) {
  note(r);
  do skip_line(r);
  while (peek(r) >= 0 && !at_group(r));
}

/* The assignment that could not be parsed is not in the deck. */
static void parse_assignment_or_recover(reader *r) {
  vd_deck *d = r->deck;
  size_t n_assignment = d->n_assignment, n_value = d->n_value;
  if (parse_assignment(r) == VD_OK) return;
  d->groups[d->n_group - 1].n_assignment -= d->n_assignment - n_assignment;
  d->n_assignment = n_assignment;
  d->n_value = n_value;
  recover(r);
}

/* The head of a group, &NAME, into a new group of the deck. */
static int parse_head(reader *r) {
  vd_deck *d = r->deck;
  char word[64];
  d->groups = grown(d->groups, d->n_group, &r->capacity[0], sizeof *d->groups);
  vd_deck_place place = here(r);
  advance(r);
  size_t end = name_end(r, r->pos);
  if (end == r->pos) return fail(r, here(r), "expected the name of a group right after '&', found %s", found(r, word));
  vd_deck_group *g = &d->groups[d->n_group];
  *g = (vd_deck_group){.assignment0 = d->n_assignment, .at = place, .name = pooled(r, r->pos, end - r->pos, true)};
  if (strcmp(g->name, "end") == 0) return fail(r, place, "this closes a group, but none is open");
  for (size_t i = 0; i < d->n_group; i++)
    if (strcmp(d->groups[i].name, g->name) == 0)
      return fail(r, place, "group &%s a second time (first in line %d): write its variables into one group", g->name,
                  d->groups[i].at.line);
  skip_to(r, end);
  if (!is_end(peek(r))) return fail(r, here(r), "expected a blank after &%s, found %s", g->name, found(r, word));
  d->n_group++;
  return VD_OK;
}

/* A group to its end, errors noted. One that is not closed ends where the next begins. */
static void parse_group(reader *r) {
  vd_deck *d = r->deck;
  char word[64];
  if (parse_head(r)) {
    recover_outside(r);
    return;
  }
  const vd_deck_group *g = &d->groups[d->n_group - 1];
  for (bool closed = false; !closed;) {
    skip_blank(r);
    if (!at_group_end(r)) {
      parse_assignment_or_recover(r);
      continue;
    }
    if (peek(r) >= 0) parse_close(r, &closed);
    if (closed) return;
    fail(r, here(r), "group &%s (line %d) is not closed: expected / before %s", g->name, g->at.line, found(r, word));
    note(r);
    return;
  }
}

/* Between groups stand blanks and comments only. */
static int fail_outside(reader *r) {
  char word[64];
  const char *lookalike = lookalike_at(r, r->pos);
  if (lookalike) return fail(r, here(r), "outside of any group stands %s", lookalike);
  return fail(r, here(r), "%s outside of any group: a group begins with &NAME and ends with /, a comment with !",
              found(r, word));
}

static void parse_deck(reader *r) {
  const char *encoding = vd_encoding_of(r->text, r->length);
  if (encoding) {
    fail(r, here(r), "this is %s text: save the deck as UTF-8 or ASCII (iconv -f %s -t UTF-8)", encoding, encoding);
    note(r);
    return;
  }
  if (r->length >= 3 && memcmp(r->text, "\xEF\xBB\xBF", 3) == 0) r->pos = 3; /* the mark that some editors leave */
  while (r->deck->n_fault < VD_DECK_FAULTS) {
    skip_blank(r);
    if (peek(r) < 0) return;
    if (peek(r) == '&' || peek(r) == '$') {
      parse_group(r);
    } else {
      fail_outside(r);
      recover_outside(r);
    }
  }
}

int vd_deck_parse(vd_deck **deck, const char *text, size_t length, const char *origin, vd_deck_place start,
                  vd_error *err) {
  vd_deck *d = vd_calloc(1, sizeof *d);
  *deck = NULL;
  d->no_places = start.column == 0;
  d->origin = vd_calloc(strlen(origin) + 1, 1);
  memcpy(d->origin, origin, strlen(origin));
  d->pool = vd_calloc(2 * length + 2, 1); /* every text takes one byte or more of the source, and one for its 0 */
  reader r = {.deck = d, .text = text, .length = length, .line = start.line, .column = start.column, .err = err};
  parse_deck(&r);
  *deck = d;
  if (d->n_fault > 0) *err = d->faults[0].error;
  return err->status;
}
