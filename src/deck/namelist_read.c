/* A deck out of a file, its errors, its end. */
#include "src/deck/namelist.h"

#include "src/base/signals.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DECK_BYTES = 1 << 20 };

/* Waits until there is something to read: a deck may come through a pipe, whose writer may never come. A read that
 * blocks would be restarted after a signal, and would not end. */
static int wait_for_input(int fd, vd_error *err) {
  struct pollfd p = {.fd = fd, .events = POLLIN};
  for (;;) {
    int n = poll(&p, 1, 100);
    if (n > 0 || (n < 0 && errno != EINTR) || vd_signals_check(err)) return err->status;
  }
}

/* Up to `size` bytes; *n becomes their number. */
static int read_text(int fd, const char *path, char *text, size_t size, size_t *n, vd_error *err) {
  for (*n = 0; *n < size;) {
    if (wait_for_input(fd, err)) return err->status;
    ssize_t got = read(fd, text + *n, size - *n);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got < 0)
      return vd_fail(err, errno == EISDIR ? VD_USAGE : VD_FAILED, "%s: cannot read the deck: %s", path,
                     strerror(errno));
    if (got == 0) break;
    *n += (size_t)got;
  }
  return VD_OK;
}

int vd_deck_read(vd_deck **deck, const char *path, vd_error *err) {
  *deck = NULL;
  size_t n;
  int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  if (fd < 0) return vd_fail(err, VD_USAGE, "%s: cannot read the deck: %s", path, strerror(errno));
  char *text = vd_calloc(DECK_BYTES + 1, 1);
  if (read_text(fd, path, text, DECK_BYTES + 1, &n, err) == VD_OK) {
    if (n > DECK_BYTES)
      vd_fail(err, VD_USAGE, "%s: this is no deck: it is larger than %d bytes", path, DECK_BYTES);
    else
      vd_deck_parse(deck, text, n, path, (vd_deck_place){1, 1}, err);
  }
  close(fd);
  free(text);
  return err->status;
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
