/* The rows behind settings.h: what every variable of a deck is. Only the settings' own files include this. */
#ifndef VD_SETTINGS_TABLE_H
#define VD_SETTINGS_TABLE_H

#include "src/deck/namelist.h"
#include "src/deck/settings.h"

/* VD_CHOICE: one of the words of `choices`; its number among them, from 0, is kept as an enum of choices.h. */
enum vd_variable_type { VD_INTEGER, VD_REAL, VD_LOGICAL, VD_STRING, VD_CHOICE };

typedef struct vd_variable {
  const char *group, *name; /* as in a deck, lower case; also the members of vd_settings */
  enum vd_variable_type type;
  size_t offset, size;     /* in vd_settings, bytes */
  const char *preset;      /* the default, as a deck writes it */
  double min, max;         /* numbers: allowed range; HUGE_VAL where there is no bound */
  bool min_open, max_open; /* the bound itself is not allowed */
  const char *choices;     /* VD_CHOICE: the words, with blanks between, in the order of the enum; else NULL */
  const char *unit;        /* "" where it has none */
  const char *flag;        /* the flag of fairseq's adaptive_span example for the same thing; "" where it has none */
  const char *doc;         /* one line or more, no newline in it */
} vd_variable;

typedef struct vd_group_row {
  const char *name, *doc;
} vd_group_row;

extern const vd_variable vd_variables[]; /* rows of one group stand together, in the order of vd_groups */
extern const size_t vd_n_variables;      /* at most VD_VARIABLES */
extern const vd_group_row vd_groups[];
extern const size_t vd_n_groups;

/* Not collective. The row of group%name (lower case), or NULL. */
const vd_variable *vd_variable_find(const char *group, const char *name);

/* Not collective. The row whose group%name has the smallest edit distance to the given one; never NULL. */
const vd_variable *vd_variable_nearest(const char *group, const char *name);

/* Not collective. The known group with the smallest edit distance to `name`; never NULL. */
const char *vd_group_nearest(const char *name);

/* Not collective. Edit distance: insertions, deletions, replacements and swaps of neighbours; the first 63 characters
 * count. */
int vd_edit_distance(const char *a, const char *b);

/* Not collective. What the variable may be, e.g. "an integer from 0 to 9" or "'masked' or 'trimmed'", into out [n]. */
void vd_variable_allowed(const vd_variable *v, char *out, size_t n);

/* Not collective. Its value in *s as a deck writes it, into out [n]; n >= 2 VD_PATH + 3 holds every one. */
void vd_variable_value(const vd_variable *v, const vd_settings *s, char *out, size_t n);

/* Not collective. Stores a deck's value in *s: type, range and choice are checked. VD_USAGE with place, group%name and
 * what is allowed. */
int vd_variable_store(const vd_variable *v, vd_settings *s, const vd_deck *deck, const vd_deck_value *value,
                      vd_error *err);

enum { VD_PLACE = VD_PATH + 32 };

/* Not collective. Where the variable got its value in *s, for the beginning of a message: "DECK:LINE:COLUMN",
 * "--set GROUP%NAME", or the deck alone where it has its default. */
void vd_settings_place(const vd_settings *s, const vd_variable *v, char out[VD_PLACE]);

#endif
