/* The command line: viaduct COMMAND DECK [--set GROUP%NAME=VALUE]... [--check], viaduct input [GROUP%NAME],
 * viaduct info FILE..., viaduct help [COMMAND | --man | --completion], --help, --version. */
#ifndef VD_COMMAND_LINE_H
#define VD_COMMAND_LINE_H

#include "src/base/error.h"

#include <stdbool.h>
#include <stdio.h>

enum vd_command {
  VD_COMMAND_PREPARE,
  VD_COMMAND_TRAIN,
  VD_COMMAND_EVAL,
  VD_COMMAND_GENERATE,
  VD_COMMAND_COMPRESS,
  VD_COMMAND_DECOMPRESS,
  VD_COMMAND_INPUT,
  VD_COMMAND_INFO,
  VD_COMMAND_HELP,
  VD_COMMAND_VERSION
};

typedef struct vd_command_line {
  enum vd_command command;
  const char *name; /* the command, or the one that help is asked for; NULL: general help. Static */
  char **arguments; /* [n_argument] deck, variable or files, borrowed from argv; the array is freed by the caller */
  int n_argument;
  char **set; /* [n_set] the values of --set, borrowed from argv; the array is freed by the caller */
  int n_set;
  bool check;      /* --check */
  bool markdown;   /* --markdown: `viaduct input` as doc/INPUT.md */
  bool man;        /* --man: `viaduct help` as a man page */
  bool completion; /* --completion: a script for bash in place of help */
} vd_command_line;

/* What a command takes and does: a row of the table that help, man page and completion are written from. */
typedef struct vd_command_row {
  const char *name, *argument;
  bool required, many; /* the argument may be missing; there may be several */
  const char *options; /* a line for each: "  --name ARGUMENT  meaning\n" */
  const char *doc;
} vd_command_row;

extern const vd_command_row vd_command_rows[]; /* [vd_n_command_rows], in the order of enum vd_command */
extern const int vd_n_command_rows;

/* Not collective. Parses argv into *line. VD_USAGE with the message to print: unknown command (with the nearest one),
 * unknown option, missing or superfluous arguments. line->set and line->arguments are allocated also
 * then. */
int vd_command_line_parse(vd_command_line *line, int argc, char **argv, vd_error *err);

/* Not collective. The help of line->name, or of the program, to `out`. */
void vd_command_line_help(const vd_command_line *line, FILE *out);

#endif
