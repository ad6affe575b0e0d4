/* Text of unknown bytes on a person's terminal: whole UTF-8 characters only, and nothing that the terminal obeys. */
#ifndef VD_TERMINAL_TEXT_H
#define VD_TERMINAL_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

/* Zero at first. */
typedef struct vd_terminal_text {
  unsigned char held[4]; /* the beginning of a character whose other bytes are still to come */
  int n;
  bool amid_a_line;
} vd_terminal_text;

/* Not collective. Writes text [n] to `out`. An incomplete UTF-8 character is held back. Bytes that are no UTF-8, and
 * control characters other than tab and line end (U+0000..1F, U+007F..9F, marks and overrides of the writing
 * direction), appear as \xHH for each byte. Errors are left to ferror(out). */
void vd_terminal_text_put(vd_terminal_text *t, const char *text, size_t n, FILE *out);

/* Not collective. The text is complete: what is held back appears as \xHH. Ends a line that is begun. */
void vd_terminal_text_end(vd_terminal_text *t, FILE *out);

#endif
