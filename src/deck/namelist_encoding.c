#include "src/deck/namelist_encoding.h"

#include <stdbool.h>
#include <string.h>

#define QUOTE "a typographic quote; a deck's strings stand in ' or \""
#define DASH "a typographic dash; a minus sign is written -"
#define BLANK "a blank of a word processor; write an ordinary one"

static const struct {
  const char *bytes, *name;
} lookalikes[] = {
    {"\xE2\x80\x98", "U+2018, " QUOTE},
    {"\xE2\x80\x99", "U+2019, " QUOTE},
    {"\xE2\x80\x9A", "U+201A, " QUOTE},
    {"\xE2\x80\x9B", "U+201B, " QUOTE},
    {"\xE2\x80\x9C", "U+201C, " QUOTE},
    {"\xE2\x80\x9D", "U+201D, " QUOTE},
    {"\xE2\x80\x9E", "U+201E, " QUOTE},
    {"\xE2\x80\x9F", "U+201F, " QUOTE},
    {"\xE2\x80\xB2", "U+2032, " QUOTE},
    {"\xE2\x80\xB3", "U+2033, " QUOTE},
    {"\xE2\x80\xB9", "U+2039, " QUOTE},
    {"\xE2\x80\xBA", "U+203A, " QUOTE},
    {"\xC2\xAB", "U+00AB, " QUOTE},
    {"\xC2\xBB", "U+00BB, " QUOTE},
    {"\xC2\xB4", "U+00B4, " QUOTE},
    {"\xEF\xBC\x82", "U+FF02, " QUOTE},
    {"\xEF\xBC\x87", "U+FF07, " QUOTE},
    {"`", "a backquote; a deck's strings stand in ' or \""},
    {"\x91", "the byte 0x91, in Windows-1252 " QUOTE},
    {"\x92", "the byte 0x92, in Windows-1252 " QUOTE},
    {"\x93", "the byte 0x93, in Windows-1252 " QUOTE},
    {"\x94", "the byte 0x94, in Windows-1252 " QUOTE},
    {"\xE2\x80\x90", "U+2010, " DASH},
    {"\xE2\x80\x91", "U+2011, " DASH},
    {"\xE2\x80\x92", "U+2012, " DASH},
    {"\xE2\x80\x93", "U+2013, " DASH},
    {"\xE2\x80\x94", "U+2014, " DASH},
    {"\xE2\x88\x92", "U+2212, " DASH},
    {"\x96", "the byte 0x96, in Windows-1252 " DASH},
    {"\x97", "the byte 0x97, in Windows-1252 " DASH},
    {"\xC2\xA0", "U+00A0, " BLANK},
    {"\xE2\x80\x89", "U+2009, " BLANK},
    {"\xE2\x80\x8B", "U+200B, " BLANK},
    {"\xE2\x80\xAF", "U+202F, " BLANK},
    {"\xE3\x80\x80", "U+3000, " BLANK},
    {"\xA0", "the byte 0xA0, in Windows-1252 " BLANK},
    {"\xEF\xBB\xBF", "U+FEFF, a byte order mark, which belongs at the beginning of a file only"},
    {"\xEF\xBC\x8C", "U+FF0C, a full-width comma; write an ordinary one"},
    {"\xEF\xBC\x9D", "U+FF1D, a full-width equals sign; write an ordinary one"},
};

const char *vd_lookalike(const char *text, size_t length) {
  for (size_t i = 0; i < sizeof lookalikes / sizeof *lookalikes; i++) {
    size_t n = strlen(lookalikes[i].bytes);
    if (n <= length && memcmp(text, lookalikes[i].bytes, n) == 0) return lookalikes[i].name;
  }
  return NULL;
}

static bool begins(const char *text, size_t length, const char *bytes, size_t n) {
  return n <= length && memcmp(text, bytes, n) == 0;
}

const char *vd_encoding_of(const char *text, size_t length) {
  if (begins(text, length, "\xFF\xFE\0\0", 4) || begins(text, length, "\0\0\xFE\xFF", 4)) return "UTF-32";
  if (begins(text, length, "\xFF\xFE", 2) || begins(text, length, "\xFE\xFF", 2)) return "UTF-16";
  /* Without a mark: a deck begins with ASCII characters, every other byte of which is then 0. */
  if (length >= 4 && !text[0] && text[1] && !text[2] && text[3]) return "UTF-16";
  if (length >= 4 && text[0] && !text[1] && text[2] && !text[3]) return "UTF-16";
  return NULL;
}
