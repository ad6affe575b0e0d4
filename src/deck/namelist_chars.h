/* Classes of characters in the text of a namelist, the same in every locale. c: a byte, or -1 behind the end. */
#ifndef VD_NAMELIST_CHARS_H
#define VD_NAMELIST_CHARS_H

#include <stdbool.h>

/* Not collective. White space between words. */
static inline bool is_space(int c) {
  return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}
/* Not collective. A line ends with LF, CR LF or, as on old Macs and out of some spreadsheets, CR alone. */
static inline bool is_line_end(int c) {
  return c == '\n' || c == '\r';
}
/* Not collective. A decimal digit. */
static inline bool is_digit(int c) {
  return c >= '0' && c <= '9';
}
/* Not collective. The character in lower case. */
static inline int lower(int c) {
  return c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c;
}
/* Not collective. A letter of ASCII. */
static inline bool is_letter(int c) {
  return lower(c) >= 'a' && lower(c) <= 'z';
}
/* Not collective. What a name may hold behind its first letter. */
static inline bool is_name(int c) {
  return is_letter(c) || is_digit(c) || c == '_';
}
/* Not collective. What ends a word: white space, a separator, a comment, the end of a group or of the text. */
static inline bool is_end(int c) {
  return c < 0 || is_space(c) || c == ',' || c == ';' || c == '/' || c == '!';
}

#endif
