#include "src/deck/settings_errors.h"

#include <stdio.h>
#include <string.h>

static bool is_before(int set, vd_deck_place at, const struct vd_deck_error *other) {
  if (set != other->set) return set < other->set;
  if (at.line != other->at.line) return at.line < other->at.line;
  return at.column < other->at.column;
}

void vd_deck_errors_add(vd_deck_errors *errors, int set, vd_deck_place at, const vd_error *error) {
  if (error->status == VD_OK) return;
  errors->n_all++;
  int i = errors->n;
  while (i > 0 && is_before(set, at, &errors->list[i - 1])) i--;
  if (i == VD_DECK_ERRORS) return;
  if (errors->n < VD_DECK_ERRORS) errors->n++;
  memmove(&errors->list[i + 1], &errors->list[i], (size_t)(errors->n - 1 - i) * sizeof errors->list[0]);
  errors->list[i] = (struct vd_deck_error){.set = set, .at = at, .error = *error};
}

int vd_deck_errors_join(const vd_deck_errors *errors, vd_error *err) {
  enum { TAIL = 40 /* of the line that counts the others */ };
  char text[sizeof err->message];
  size_t used = 0;
  int i = 0;
  if (errors->n_all == 0) return VD_OK;
  for (; i < errors->n; i++) {
    const char *message = errors->list[i].error.message;
    size_t n = strlen(message);
    if (i > 0 && used + 1 + n + TAIL > sizeof text) break;
    used += (size_t)snprintf(text + used, sizeof text - used, "%s%s", i > 0 ? "\n" : "", message);
  }
  if (i < errors->n_all && used + TAIL <= sizeof text)
    snprintf(text + used, sizeof text - used, "\nand %d more errors", errors->n_all - i);
  return vd_fail(err, VD_USAGE, "%s", text);
}
