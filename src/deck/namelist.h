/* Fortran namelist text, as gfortran reads it, into a list of groups, assignments and values that remember where they
 * stood. Knows nothing of Viaduct. The whole text is parsed before anybody sees a value, so that a deck that breaks
 * off in the middle changes nothing. What is accepted, and where this reader is stricter than gfortran, stands in the
 * preface of doc/INPUT.md. Errors are VD_USAGE and begin with ORIGIN:LINE:COLUMN. */
#ifndef VD_DECK_H
#define VD_DECK_H

#include "src/base/error.h"

#include <stdbool.h>
#include <stdint.h>

/* A position in the text: lines and columns count from 1, columns in characters (UTF-8), not bytes. */
typedef struct vd_deck_place {
  int line, column;
} vd_deck_place;

typedef struct vd_deck_value {
  int64_t repeat;   /* r of r*c; 1 where there is none */
  bool null;        /* nothing stands here: the variable keeps its value */
  bool quoted;      /* a string; `text` is its content, quotes undone */
  const char *text; /* as written where unquoted; ends with a 0 that is not counted in length */
  size_t length;    /* bytes */
  vd_deck_place at;
} vd_deck_value;

typedef struct vd_deck_assignment {
  const char *name;       /* in lower case */
  bool subscript;         /* a(first) or a(first:last:stride) */
  bool section;           /* with a colon: ends at `last`; without, values run on to the end of the array */
  bool open_last;         /* a(first:): `last` is the end of the array */
  int64_t first, last;    /* from 1 */
  int64_t stride;         /* not 0 */
  size_t value0, n_value; /* deck->values[value0 ...] */
  vd_deck_place at;
} vd_deck_assignment;

typedef struct vd_deck_group {
  const char *name;                 /* in lower case */
  size_t assignment0, n_assignment; /* deck->assignments[assignment0 ...] */
  vd_deck_place at;
} vd_deck_group;

/* A place at which the text is no namelist. */
enum { VD_DECK_FAULTS = 20 /* parsing ends after so many */ };
typedef struct vd_deck_fault {
  vd_deck_place at;
  vd_error error;
} vd_deck_fault;

typedef struct vd_deck {
  char *origin;   /* the file's name, for messages */
  bool no_places; /* messages name the origin alone */
  bool of_file;   /* settings out of a file that a run wrote: old spellings are translated */
  vd_deck_group *groups;
  size_t n_group;
  vd_deck_assignment *assignments;
  size_t n_assignment;
  vd_deck_value *values;
  size_t n_value;
  vd_deck_fault *faults; /* [n_fault], in the order of the text; NULL: none */
  size_t n_fault;
  char *pool; /* holds every name and text above */
} vd_deck;

/* Not collective. Parses text [length] (need not end with a 0); `origin` names it in messages and `start` is
 * the place of its first character, {1, 1} for a file; column 0: the text is an argument in which places help nobody,
 * and messages name the origin alone. *deck: to be freed with
 * vd_deck_free, also on error. VD_USAGE: what is not a namelist, with its place; *deck then holds all such places and
 * what could be parsed between them. */
int vd_deck_parse(vd_deck **deck, const char *text, size_t length, const char *origin, vd_deck_place start,
                  vd_error *err);

/* Not collective. Reads the file `path` (at most 1 MiB) and parses it, as vd_deck_parse. VD_USAGE also where there is
 * no such file, or none that may be opened; VD_FAILED: it cannot be read; *deck is NULL then. */
int vd_deck_read(vd_deck **deck, const char *path, vd_error *err);

/* Not collective. Frees a deck; NULL is allowed. */
void vd_deck_free(vd_deck *deck);

/* Not collective. VD_USAGE with "ORIGIN:LINE:COLUMN: MESSAGE" (no_places: "ORIGIN: MESSAGE"), for the checks of the
 * deck's readers. */
int vd_deck_fail(const vd_deck *deck, vd_deck_place at, vd_error *err, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Not collective. What all assignments to `name` (lower case) in `group` put into the `size` elements of an array
 * (size 0: a scalar, one element): slots [max(size, 1)] gets borrowed values, NULL where the old value stays. *at: of
 * the first assignment, line 0 when there is none; of the error where there is one. VD_USAGE: too many values, a
 * subscript out of range or on a scalar, an element that is assigned twice. */
int vd_deck_resolve(const vd_deck *deck, const vd_deck_group *group, const char *name, int64_t size,
                    const vd_deck_value **slots, vd_deck_place *at, vd_error *err);

/* What a conversion found. */
enum vd_deck_outcome { VD_DECK_OK, VD_DECK_TYPE /* not of that type */, VD_DECK_OVERFLOW /* does not fit */ };

/* Not collective. An integer: optional sign, decimal digits; 64 bits. *out only written with VD_DECK_OK. */
enum vd_deck_outcome vd_deck_integer(const vd_deck_value *value, int64_t *out);

/* Not collective. A real: 5, 5., .5, 5e-7, 5d-7, 5q-7, 5-7, [+-]inf, [+-]infinity, nan, nan(...), any case.
 * VD_DECK_OVERFLOW: a number beyond the range of double. *out only written with VD_DECK_OK. */
enum vd_deck_outcome vd_deck_real(const vd_deck_value *value, double *out);

/* Not collective. A logical: T, F, true, false, with or without dots, any case. *out only written with VD_DECK_OK. */
enum vd_deck_outcome vd_deck_logical(const vd_deck_value *value, bool *out);

#endif
