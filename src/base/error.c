#include "src/base/error.h"

#include "src/base/clock.h"

#include <mpi.h> /* for the abort in vd_bug_at() alone */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int vd_fail(vd_error *err, int status, const char *format, ...) {
  if (err->status != VD_OK) return err->status;
  va_list args;
  va_start(args, format);
  vsnprintf(err->message, sizeof err->message, format, args);
  va_end(args);
  err->status = status;
  return status;
}

int vd_wrap(vd_error *err, const char *format, ...) {
  if (err->status == VD_OK) return VD_OK;
  char before[512], all[sizeof err->message + sizeof before + 2];
  va_list args;
  va_start(args, format);
  vsnprintf(before, sizeof before, format, args);
  va_end(args);
  snprintf(all, sizeof all, "%s: %s", before, err->message);
  snprintf(err->message, sizeof err->message, "%.*s", (int)sizeof err->message - 1, all);
  return err->status;
}

char *vd_escape(const char *text, bool keep_lines) {
  char *out = vd_calloc(4 * strlen(text) + 1, 1), *to = out;
  for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
    /* In UTF-8 the control characters 0x80 to 0x9f are the bytes 0xc2 0x80 to 0xc2 0x9f. */
    bool is_c1 = c[0] == 0xc2 && c[1] >= 0x80 && c[1] <= 0x9f;
    bool is_control = c[0] < 0x20 || c[0] == 0x7f || is_c1;
    if (!is_control || (keep_lines && c[0] == '\n'))
      *to++ = (char)*c;
    else
      to += snprintf(to, 5, "\\x%02x", is_c1 ? *++c : *c);
  }
  return out;
}

void vd_error_print(const vd_error *err) {
  if (err->status == VD_OK || !err->message[0]) return;
  char *message = vd_escape(err->message, true);
  fprintf(stderr, "viaduct: error: %s\n", message);
  free(message);
}

_Noreturn void vd_bug_at(const char *file, int line, const char *format, ...) {
  int ready = 0, rank = 0;
  MPI_Initialized(&ready);
  if (ready) MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  char when[VD_UTC_BYTES], message[1024];
  vd_clock_utc(when);
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  fprintf(stderr, "viaduct: bug: rank %d, %s, %s:%d: %s\n", rank, when, file, line, message);
  if (ready) MPI_Abort(MPI_COMM_WORLD, VD_FAILED);
  abort();
}

void *vd_calloc(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size ? size : 1);
  if (!p) vd_bug("no memory for %zu elements of %zu bytes", count, size);
  return p;
}
