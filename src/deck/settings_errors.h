/* All errors of a deck and its --set arguments in one message, in the order of their places. */
#ifndef VD_SETTINGS_ERRORS_H
#define VD_SETTINGS_ERRORS_H

#include "src/deck/namelist.h"

enum {
  VD_DECK_ERRORS = 20, /* the first so many are reported, the others counted */
  VD_NO_SET = 0,       /* the error stands in the deck, not in the n-th --set */
  VD_NO_PLACE = 1 << 30
};

typedef struct vd_deck_errors {
  int n, n_all; /* reported; found */
  struct vd_deck_error {
    int set; /* the n-th --set, from 1; VD_NO_SET; VD_NO_PLACE: of no place, after all others */
    vd_deck_place at;
    vd_error error;
  } list[VD_DECK_ERRORS]; /* [n], in the order of sets and places */
} vd_deck_errors;

/* Not collective. Adds a copy of *error; nothing where it holds no error. */
void vd_deck_errors_add(vd_deck_errors *errors, int set, vd_deck_place at, const vd_error *error);

/* Not collective. VD_OK where there are none; else VD_USAGE with one line for each that fits into *err, and the number
 * of the others. */
int vd_deck_errors_join(const vd_deck_errors *errors, vd_error *err);

#endif
