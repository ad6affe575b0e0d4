/* A deck out of a file, its errors, its end. */
#include "src/deck/namelist.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DECK_BYTES = 1 << 20 };

int vd_deck_read(vd_deck **deck, const char *path, vd_error *err) {
  *deck = NULL;
  errno = 0;
  FILE *f = fopen(path, "rb");
  if (!f) return vd_fail(err, VD_USAGE, "%s: cannot read the deck: %s", path, strerror(errno));
  char *text = vd_calloc(DECK_BYTES + 1, 1);
  size_t n = fread(text, 1, DECK_BYTES + 1, f);
  int status = VD_OK;
  if (ferror(f))
    status =
        vd_fail(err, errno == EISDIR ? VD_USAGE : VD_FAILED, "%s: cannot read the deck: %s", path, strerror(errno));
  else if (n > DECK_BYTES)
    status = vd_fail(err, VD_USAGE, "%s: this is no deck: it is larger than %d bytes", path, DECK_BYTES);
  else
    status = vd_deck_parse(deck, text, n, path, (vd_deck_place){1, 1}, err);
  fclose(f);
  free(text);
  return status;
}

void vd_deck_free(vd_deck *deck) {
  if (!deck) return;
  free(deck->origin);
  free(deck->groups);
  free(deck->assignments);
  free(deck->values);
  free(deck->pool);
  free(deck->faults);
  free(deck);
}

int vd_deck_fail(const vd_deck *deck, vd_deck_place at, vd_error *err, const char *format, ...) {
  char message[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  if (deck->no_places) return vd_fail(err, VD_USAGE, "%s: %s", deck->origin, message);
  return vd_fail(err, VD_USAGE, "%s:%d:%d: %s", deck->origin, at.line, at.column, message);
}
