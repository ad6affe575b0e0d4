#include "src/base/terminal_text.h"

#include <string.h>

/* The bytes of the UTF-8 character that s [n] begins with; 0: it is incomplete; -1: s begins none. */
static int character(const unsigned char *s, int n) {
  int c = s[0], low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
  int length = c < 0x80 ? 1 : c < 0xC2 ? -1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : -1;
  for (int i = 1; i < n && i < length; i++, low = 0x80, high = 0xBF)
    if (s[i] < low || s[i] > high) return -1;
  return length > n ? 0 : length;
}

/* A whole character that a terminal obeys instead of showing it. */
static bool is_control(const unsigned char *s, int length) {
  if (length == 1) return (s[0] < 0x20 && s[0] != '\t' && s[0] != '\n') || s[0] == 0x7F;
  if (length == 2) return s[0] == 0xC2 && s[1] < 0xA0;
  if (length != 3 || s[0] != 0xE2) return false;
  return (s[1] == 0x80 && (s[2] == 0x8E || s[2] == 0x8F || (s[2] >= 0xA8 && s[2] <= 0xAE))) ||
         (s[1] == 0x81 && s[2] >= 0xA6 && s[2] <= 0xA9);
}

/* Writes the first `length` bytes that are held, as they are or escaped, and drops them. */
static void release(vd_terminal_text *t, int length, bool escaped, FILE *out) {
  for (int i = 0; i < length; i++) {
    if (escaped)
      fprintf(out, "\\x%02X", t->held[i]);
    else
      fputc(t->held[i], out);
  }
  t->amid_a_line = escaped || t->held[0] != '\n';
  t->n -= length;
  memmove(t->held, t->held + length, (size_t)t->n);
}

void vd_terminal_text_put(vd_terminal_text *t, const char *text, size_t n, FILE *out) {
  for (size_t i = 0; i < n; i++) {
    t->held[t->n++] = (unsigned char)text[i];
    while (t->n > 0) {
      int length = character(t->held, t->n);
      if (length == 0) break;
      release(t, length < 0 ? 1 : length, length < 0 || is_control(t->held, length), out);
    }
  }
}

void vd_terminal_text_end(vd_terminal_text *t, FILE *out) {
  while (t->n > 0) release(t, 1, true, out);
  if (t->amid_a_line) fputc('\n', out);
  t->amid_a_line = false;
}
