/* Names for the characters that word processors, web pages and other encodings put into a deck, for its messages. */
#ifndef VD_NAMELIST_ENCODING_H
#define VD_NAMELIST_ENCODING_H

#include <stddef.h>

/* Not collective. The encoding of text [length] that begins like UTF-16 or UTF-32, e.g. "UTF-16"; NULL for anything
 * else. The mark of UTF-8 is no error: the parser skips it. */
const char *vd_encoding_of(const char *text, size_t length);

/* Not collective. What the character at the start of text [length] is where it is easily mistaken for one of the
 * characters of a deck, with what to write instead; NULL for any other. */
const char *vd_lookalike(const char *text, size_t length);

#endif
