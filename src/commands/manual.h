/* The man page and the completion for bash, written from the tables of commands and of settings. */
#ifndef VD_MANUAL_H
#define VD_MANUAL_H

#include <stdio.h>

/* Not collective. viaduct(1) as roff with the macros of man(7), to `out`: every command, option and variable. */
void vd_manual(FILE *out);

/* Not collective. A bash script, to `out`, that completes commands, decks, options, variables behind --set and the
 * words that a variable may be. It needs bash alone. */
void vd_completion(FILE *out);

#endif
