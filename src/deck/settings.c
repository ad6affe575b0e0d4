/* Reads decks into settings, through the table. */
#include "src/deck/settings_errors.h"
#include "src/deck/settings_table.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Unknown names are counted up to this many: looking for the nearest of each takes time. */
enum { VD_NAME_ERRORS = 1000 };

/* ---- one value ---- */

/* Control characters would spoil messages, logs and the echo; a 0 would end the string early. */
static bool has_control(const vd_deck_value *v) {
  for (size_t i = 0; i < v->length; i++)
    if ((unsigned char)v->text[i] < 32 || v->text[i] == 127) return true;
  return false;
}

/* The number of `word` among the words of `choices`, from 0; -1: it is none of them. */
static int choice_of(const char *choices, const char *word) {
  size_t n = strlen(word);
  int number = 0;
  for (const char *p = choices; *p; number++) {
    size_t length = strcspn(p, " ");
    if (length == n && strncmp(p, word, n) == 0) return number;
    p += length + (p[length] == ' ');
  }
  return -1;
}

static bool in_range(const vd_variable *v, double x) {
  if (x < v->min || (v->min_open && x <= v->min)) return false;
  return !(x > v->max || (v->max_open && x >= v->max));
}

/* Short enough for a message. */
static int shown(const vd_deck_value *v) {
  return v->length < 60 ? (int)v->length : 60;
}

static int fail_value(const vd_variable *v, const vd_deck *deck, const vd_deck_value *value, vd_error *err,
                      const char *what) {
  char allowed[512];
  const char *quote = value->quoted ? "'" : "";
  vd_variable_allowed(v, allowed, sizeof allowed);
  return vd_deck_fail(deck, value->at, err, "%s%%%s = %s%.*s%s %s: it takes %s", v->group, v->name, quote, shown(value),
                      value->text, quote, what, allowed);
}

static int store_string(const vd_variable *v, char *out, const vd_deck *deck, const vd_deck_value *value,
                        vd_error *err) {
  if (!value->quoted) return fail_value(v, deck, value, err, "is not a string in quotes");
  if (has_control(value))
    return vd_deck_fail(deck, value->at, err, "%s%%%s: a string cannot hold control characters", v->group, v->name);
  if (value->length >= v->size)
    return vd_deck_fail(deck, value->at, err, "%s%%%s: the string is too long, %zu bytes where %zu are allowed",
                        v->group, v->name, value->length, v->size - 1);
  memset(out, 0, v->size);
  memcpy(out, value->text, value->length);
  return VD_OK;
}

/* A word that had another spelling in earlier versions: of a deck's writer for the message, of files for reading. */
static const char *new_spelling(const vd_variable *v, const char *word) {
  bool renamed = strcmp(v->group, "model") == 0 && strcmp(v->name, "init") == 0 && strcmp(word, "toolkit") == 0;
  return renamed ? "fairseq" : NULL;
}

static int store_choice(const vd_variable *v, void *out, const vd_deck *deck, const vd_deck_value *value,
                        vd_error *err) {
  if (!value->quoted) return fail_value(v, deck, value, err, "is not a string in quotes");
  const char *renamed = new_spelling(v, value->text);
  int number = choice_of(v->choices, value->text);
  if (number < 0 && renamed && deck->of_file) number = choice_of(v->choices, renamed);
  if (number < 0 && renamed) {
    char what[96];
    snprintf(what, sizeof what, "is called '%s' now", renamed);
    return fail_value(v, deck, value, err, what);
  }
  if (number < 0) return fail_value(v, deck, value, err, "is not allowed");
  if (v->size != sizeof number) vd_bug("%s%%%s is no enum", v->group, v->name);
  memcpy(out, &number, sizeof number);
  return VD_OK;
}

static int store_number(const vd_variable *v, void *out, const vd_deck *deck, const vd_deck_value *value,
                        vd_error *err) {
  int64_t whole = 0;
  double x = 0;
  enum vd_deck_outcome outcome;
  if (v->type == VD_INTEGER) {
    outcome = vd_deck_integer(value, &whole);
    x = (double)whole;
  } else {
    outcome = vd_deck_real(value, &x);
  }
  if (outcome == VD_DECK_TYPE)
    return fail_value(v, deck, value, err, v->type == VD_INTEGER ? "is not an integer" : "is not a number");
  if (outcome == VD_DECK_OVERFLOW) return fail_value(v, deck, value, err, "is beyond what fits into 64 bits");
  if (!isfinite(x)) return fail_value(v, deck, value, err, "is not finite");
  if (!in_range(v, x)) return fail_value(v, deck, value, err, "is out of range");
  if (v->type == VD_INTEGER)
    memcpy(out, &whole, sizeof whole);
  else
    memcpy(out, &x, sizeof x);
  return VD_OK;
}

int vd_variable_store(const vd_variable *v, vd_settings *s, const vd_deck *deck, const vd_deck_value *value,
                      vd_error *err) {
  char *out = (char *)s + v->offset;
  if (v->type == VD_STRING) return store_string(v, out, deck, value, err);
  if (v->type == VD_CHOICE) return store_choice(v, out, deck, value, err);
  if (v->type != VD_LOGICAL) return store_number(v, out, deck, value, err);
  bool b;
  if (vd_deck_logical(value, &b) != VD_DECK_OK) return fail_value(v, deck, value, err, "is not a logical");
  memcpy(out, &b, sizeof b);
  return VD_OK;
}

/* ---- a whole deck ---- */

/* Groups and variables that nobody knows. */
static void check_names(const vd_deck *deck, const vd_deck_group *g, int set, vd_deck_errors *errors) {
  bool known = false;
  for (size_t i = 0; i < vd_n_groups; i++) known = known || strcmp(vd_groups[i].name, g->name) == 0;
  if (!known) {
    vd_error err = {0};
    vd_deck_fail(deck, g->at, &err, "unknown group &%s; the nearest known group is &%s", g->name,
                 vd_group_nearest(g->name));
    vd_deck_errors_add(errors, set, g->at, &err);
    return; /* of its variables nothing can be said */
  }
  for (size_t i = 0; i < g->n_assignment; i++) {
    const vd_deck_assignment *a = &deck->assignments[g->assignment0 + i];
    if (vd_variable_find(g->name, a->name)) continue;
    const vd_variable *near = vd_variable_nearest(g->name, a->name);
    vd_error err = {0};
    vd_deck_fail(deck, a->at, &err, "unknown variable %s%%%s; the nearest known one is %s%%%s", g->name, a->name,
                 near->group, near->name);
    vd_deck_errors_add(errors, set, a->at, &err);
    if (errors->n_all >= VD_NAME_ERRORS) return;
  }
}

static void apply_group(vd_settings *s, const vd_deck *deck, const vd_deck_group *g, int set, vd_deck_errors *errors) {
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    const vd_deck_value *value;
    vd_deck_place at;
    vd_error err = {0};
    if (strcmp(v->group, g->name) != 0) continue;
    if (vd_deck_resolve(deck, g, v->name, 0, &value, &at, &err) == VD_OK && value) {
      at = value->at;
      if (vd_variable_store(v, s, deck, value, &err) == VD_OK)
        s->source[i] = (vd_source){at.line, at.column, set != VD_NO_SET};
    }
    vd_deck_errors_add(errors, set, at, &err);
  }
}

static void apply_deck(vd_settings *s, const vd_deck *deck, int set, vd_deck_errors *errors) {
  for (size_t i = 0; i < deck->n_group && errors->n_all < VD_NAME_ERRORS; i++)
    check_names(deck, &deck->groups[i], set, errors);
  for (size_t i = 0; i < deck->n_group; i++) apply_group(s, deck, &deck->groups[i], set, errors);
}

void vd_settings_default(vd_settings *s) {
  memset(s, 0, sizeof *s);
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    char text[VD_PATH];
    vd_deck *deck;
    vd_error err = {0};
    snprintf(text, sizeof text, "&%s %s=%s /", v->group, v->name, v->preset);
    if (vd_deck_parse(&deck, text, strlen(text), "default", (vd_deck_place){1, 1}, &err) ||
        vd_variable_store(v, s, deck, &deck->values[0], &err))
      vd_bug("the settings table: %s", err.message);
    vd_deck_free(deck);
  }
}

/* ---- --set ---- */

static int fail_set(const char *origin, vd_error *err, const char *what) {
  return vd_fail(err, VD_USAGE, "%s: %s (write --set GROUP%%NAME=VALUE)", origin, what);
}

/* Copies n bytes in lower case, without blanks around; false where they do not fit into VD_TEXT. */
static bool fold(const char *text, size_t n, char out[VD_TEXT]) {
  while (n > 0 && isspace((unsigned char)*text)) text++, n--;
  while (n > 0 && isspace((unsigned char)text[n - 1])) n--;
  if (n >= VD_TEXT) return false;
  for (size_t i = 0; i < n; i++) out[i] = (char)tolower((unsigned char)text[i]);
  out[n] = 0;
  return true;
}

/* Is the value to be taken as it stands, because the variable is a string and no quote begins it? */
static bool is_bare(const char *group, const char *name, const char *value) {
  const vd_variable *v = vd_variable_find(group, name);
  while (isspace((unsigned char)*value)) value++;
  return v && (v->type == VD_STRING || v->type == VD_CHOICE) && *value != '\'' && *value != '"';
}

/* One assignment as a namelist: & stands in column 0, so that columns are those of the argument. */
static char *set_text(const char *arg, const char *value, bool bare) {
  char *text = vd_calloc(2 * strlen(arg) + 16, 1), *out = text;
  *out++ = '&';
  for (const char *p = arg; p < value; p++) *out++ = *p;
  *(text + 1 + (strchr(arg, '%') - arg)) = ' ';
  if (bare) *out++ = '\'';
  for (const char *p = value; *p; p++) {
    if (bare && *p == '\'') *out++ = '\'';
    *out++ = *p;
  }
  memcpy(out, bare ? "'\n/" : "\n/", bare ? 3 : 2);
  return text;
}

/* number: of this --set among several; 0: there is one alone. */
static int parse_set(vd_deck **deck, const char *arg, int number, vd_error *err) {
  const char *percent = strchr(arg, '%'), *equals = strchr(arg, '=');
  char group[VD_TEXT], name[VD_TEXT], origin[VD_TEXT];
  *deck = NULL;
  if (number > 0)
    snprintf(origin, sizeof origin, "--set %.200s (number %d)", arg, number);
  else
    snprintf(origin, sizeof origin, "--set %.200s", arg);
  if (!equals || !percent || percent > equals) return fail_set(origin, err, "this is no assignment");
  if (!fold(arg, (size_t)(percent - arg), group) || !fold(percent + 1, (size_t)(equals - percent - 1), name))
    return fail_set(origin, err, "the name is too long");
  if (strpbrk(arg, "\n\r")) return fail_set(origin, err, "a line's end in it");
  char *text = set_text(arg, equals + 1, is_bare(group, name, equals + 1));
  if (vd_deck_parse(deck, text, strlen(text), origin, (vd_deck_place){1, 0}, err) == VD_OK) {
    if ((*deck)->n_group != 1 || (*deck)->n_assignment != 1)
      fail_set(origin, err, "this is more or less than one assignment");
    else if ((*deck)->n_value == 0)
      fail_set(origin, err, "there is no value");
  }
  free(text);
  return err->status;
}

static void apply_set(vd_settings *s, const char *arg, int set, bool alone, vd_deck_errors *errors) {
  vd_deck *deck;
  vd_error err = {0};
  if (parse_set(&deck, arg, alone ? 0 : set, &err) == VD_OK) apply_deck(s, deck, set, errors);
  vd_deck_errors_add(errors, set, (vd_deck_place){1, 0}, &err);
  vd_deck_free(deck);
}

/* ---- reading ---- */

/* Takes the deck over, which may have faults: they are reported with the errors of what lies between them. The settings
 * change only when everything is right. The rules between variables are not checked before all values are right: a
 * value that was refused would break rules that its writer kept. */
static int read_deck(vd_settings *s, vd_deck *deck, char *const *set, int n_set, const char *command, vd_error *err) {
  vd_settings *fresh = vd_calloc(1, sizeof *fresh);
  vd_deck_errors *errors = vd_calloc(1, sizeof *errors);
  vd_settings_default(fresh);
  snprintf(fresh->origin, sizeof fresh->origin, "%s", deck->origin);
  for (size_t i = 0; i < deck->n_fault; i++)
    vd_deck_errors_add(errors, VD_NO_SET, deck->faults[i].at, &deck->faults[i].error);
  apply_deck(fresh, deck, VD_NO_SET, errors);
  for (int i = 0; i < n_set; i++) apply_set(fresh, set[i], i + 1, n_set == 1, errors);
  if (vd_deck_errors_join(errors, err) == VD_OK && vd_settings_check(fresh, command, err) == VD_OK) *s = *fresh;
  free(errors);
  free(fresh);
  vd_deck_free(deck);
  return err->status;
}

int vd_settings_read(vd_settings *s, const char *path, char *const *set, int n_set, const char *command,
                     vd_error *err) {
  vd_deck *deck;
  vd_deck_read(&deck, path, err);
  if (!deck) return err->status;
  *err = (vd_error){0}; /* the deck holds it */
  return read_deck(s, deck, set, n_set, command, err);
}

int vd_settings_read_text(vd_settings *s, const char *text, const char *origin, vd_error *err) {
  vd_deck *deck;
  vd_deck_parse(&deck, text, strlen(text), origin, (vd_deck_place){1, 1}, err);
  *err = (vd_error){0}; /* the deck holds it */
  deck->of_file = true;
  return read_deck(s, deck, NULL, 0, NULL, err);
}
