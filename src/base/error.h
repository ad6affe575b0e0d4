/* The main header of src/base/: what every other folder may use and what uses none of them.
 *
 * Here live errors and allocation (this header), the real type (real.h), counter-based random numbers (random.h),
 * signals (signals.h), threads (thread.h), clocks (clock.h), the terminal (terminal.h, terminal_text.h), memory and
 * disk of the host (machine.h), choices of the deck as enums (choices.h), compression of arrays of numbers
 * (plane_deflate.h) and the version (version.h). Nothing here writes a file or sends a message; the one MPI call is
 * the abort in vd_bug().
 *
 * An error that a user or a disk causes is a status that functions return: the callee fills a vd_error, callers put
 * context before its message, and main prints it once. Ranks agree on an error with vd_agree() of
 * src/comm/collectives.h. A bug ends the program with vd_bug(), which names rank, time, file and line. */
#ifndef VD_ERROR_H
#define VD_ERROR_H

#include <stdbool.h>

#include <stddef.h>

/* Exit statuses of the program; functions return them too. */
enum {
  VD_OK = 0,
  VD_FAILED = 1,  /* a file, the machine, the numbers: anything but the deck and the command line */
  VD_USAGE = 2,   /* the command line or the deck is wrong */
  VD_STOPPED = 75 /* stopped on a signal after a checkpoint was written: requeue */
};

/* One error: what went wrong first, with the context that callers put before it. */
typedef struct vd_error {
  int status;         /* VD_OK while nothing went wrong */
  char message[2048]; /* no newline at the end; may hold several lines */
} vd_error;

/* Not collective. Records an error in *err (caller's; must not be NULL) and returns `status`, so that a
 * function can `return vd_fail(err, VD_FAILED, "...")`. A second error does not overwrite the first. */
int vd_fail(vd_error *err, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Not collective. Puts "CONTEXT: " before the message already in *err and returns err->status. */
int vd_wrap(vd_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Not collective. A copy of `text` for a terminal, which the caller frees: control characters become \\xNN, line ends
 * only where keep_lines is false. */
char *vd_escape(const char *text, bool keep_lines);

/* Not collective. Prints "viaduct: error: MESSAGE" on stderr, control characters escaped; nothing when err holds no
 * error. */
void vd_error_print(const vd_error *err);

/* Not collective. A bug: prints rank, time, file:line and the message, and calls MPI_Abort. */
#define vd_bug(...) vd_bug_at(__FILE__, __LINE__, __VA_ARGS__)
/* Not collective. What vd_bug() calls; does not return. */
_Noreturn void vd_bug_at(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Not collective. malloc/calloc that never return NULL for n > 0: running out of host memory while setting up
 * prints what was asked for and ends the run. Zeroed. Free with free(). */
void *vd_calloc(size_t count, size_t size);

#endif
