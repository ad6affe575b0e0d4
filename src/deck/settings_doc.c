/* `viaduct input` and doc/INPUT.md: the table for people. */
#include "src/deck/settings_table.h"

#include <ctype.h>
#include <string.h>

/* Prints text wrapped at 80 columns, every line indented. */
static void wrapped(FILE *out, int indent, const char *text) {
  int column = 0;
  while (*text) {
    int n = (int)strcspn(text, " ");
    if (column > 0 && indent + column + 1 + n > 80) {
      fputc('\n', out);
      column = 0;
    }
    if (column == 0)
      column = fprintf(out, "%*s%.*s", indent, "", n, text) - indent;
    else
      column += fprintf(out, " %.*s", n, text);
    text += n;
    while (*text == ' ') text++;
  }
  fputc('\n', out);
}

/* ---- viaduct input ---- */

static void help_variable(const vd_variable *v, FILE *out) {
  char allowed[512];
  vd_variable_allowed(v, allowed, sizeof allowed);
  fprintf(out, "%s%%%s = %s\n", v->group, v->name, v->preset);
  wrapped(out, 4, v->doc);
  fprintf(out, "    allowed: %s\n", allowed);
  if (*v->unit) fprintf(out, "    unit: %s\n", v->unit);
  if (*v->flag) fprintf(out, "    fairseq's flag: %s\n", v->flag);
}

static void help_group(const vd_group_row *g, FILE *out) {
  fprintf(out, "&%s\n", g->name);
  wrapped(out, 2, g->doc);
  for (size_t i = 0; i < vd_n_variables; i++) {
    if (strcmp(vd_variables[i].group, g->name) != 0) continue;
    fputc('\n', out);
    help_variable(&vd_variables[i], out);
  }
}

int vd_settings_help(const char *what, FILE *out, vd_error *err) {
  char word[VD_TEXT] = "";
  if (!what) {
    fprintf(out,
            "Variables of a deck, with their defaults. `viaduct input GROUP` or `viaduct input GROUP%%NAME` shows a "
            "part.\n");
    for (size_t i = 0; i < vd_n_groups; i++) {
      fputc('\n', out);
      help_group(&vd_groups[i], out);
    }
    return VD_OK;
  }
  for (size_t i = 0; what[i] && i + 1 < sizeof word; i++) word[i] = (char)tolower((unsigned char)what[i]);
  char *name = strchr(word, '%'), *group = word + (*word == '&');
  if (name) *name++ = 0;
  for (size_t i = 0; !name && i < vd_n_groups; i++) {
    if (strcmp(group, vd_groups[i].name) != 0) continue;
    help_group(&vd_groups[i], out);
    return VD_OK;
  }
  const vd_variable *v = name ? vd_variable_find(group, name) : NULL;
  if (v) {
    help_variable(v, out);
    return VD_OK;
  }
  const vd_variable *near = vd_variable_nearest(name ? group : "", name ? name : group);
  const char *near_group = vd_group_nearest(group);
  if (!name && vd_edit_distance(group, near_group) <= vd_edit_distance(group, near->name))
    return vd_fail(err, VD_USAGE, "no group \"%.80s\" in a deck; the nearest known group is %s", group, near_group);
  return vd_fail(err, VD_USAGE, "no variable \"%.80s\" in a deck; the nearest known one is %s%%%s", what, near->group,
                 near->name);
}

/* ---- doc/INPUT.md ---- */

static const char *const preface[] = {
    "# Decks: what Viaduct reads",
    "",
    "This page is generated from the table in src/deck/settings_table.c (`viaduct input --markdown`). `viaduct input`",
    "prints the same in a terminal, `viaduct input GROUP%NAME` one variable. input/ holds commented decks for every",
    "command.",
    "",
    "Where a variable has a counterpart in fairseq, its flag is named: of the example",
    "[adaptive_span](https://github.com/facebookresearch/fairseq/tree/main/examples/adaptive_span),",
    "or of fairseq's own command line.",
    "",
    "## How a deck is written",
    "",
    "A deck is a Fortran namelist file:",
    "",
    "    ! A comment runs from ! to the end of the line.",
    "    &run",
    "      title = 'It''s a quoted string; a quote inside is doubled'",
    "      max_updates = 1000",
    "    /",
    "    &optimizer lr = 7d-2, clip_step = 0.03 /",
    "",
    "- Groups come in any order, each at most once; what is not given keeps its default. A group ends with `/` (or",
    "  `&end`), and may be written `$group ... $end`. Names of groups and variables may be in any case.",
    "- Values: integers `12`; reals `0.3`, `3`, `.3`, `3e-1`, `3d-1`, `3-1`; logicals `.true.`, `.false.`, `T`, `F`,",
    "  in any case; strings in `'` or `\"`. A string may run over several lines, whose ends are dropped.",
    "- Values are separated by blanks, line ends, `,` or `;`. Nothing between two separators is a null value, which",
    "  leaves the variable as it was. `r*c` stands for r times the value c, `r*` for r nulls. Arrays (none of",
    "  Viaduct's variables is one today) take elements `a(3) = 1, 2, 3` and sections `a(1:6:2) = ...`.",
    "- A line ends with LF, CR LF or CR. The text is UTF-8 or ASCII, with or without a byte order mark. UTF-16 and",
    "  typographic quotes outside of strings are refused by name.",
    "- Paths are relative to the working directory of the program, not to the deck.",
    "- `--set GROUP%NAME=VALUE` on the command line overrules the deck, and the last `--set` of a variable wins. VALUE",
    "  is written as in a deck, but a string may come without its quotes, since shells eat them:",
    "  `--set run%directory=runs/second`.",
    "",
    "The whole deck is read and checked before anything is applied or any file is touched. All errors of a deck and of",
    "`--set` are printed at once, in the order of their places: up to 20, then the number of the others. Each names",
    "file, line and column or the `--set`, variable, the nearest known name and the allowed values. Behind a place",
    "that is no namelist, reading continues with the next line that begins an assignment or a group. The rules between",
    "variables are checked once every value is right. The exit status is 2, also where the deck is missing.",
    "",
    "## Where Viaduct differs from gfortran",
    "",
    "What this reader accepts, gfortran accepts too, with the same values, but for this: a comment may stand wherever",
    "a blank may; a comma may begin a line; the last line needs no end; a comment ends with a CR too, where gfortran",
    "skips all up to the next LF without a word. In lists of several values gfortran 12",
    "stumbles over such commas and comments, and over true and false without their dots. This reader refuses some of",
    "what gfortran lets pass, because it is more often a slip than meant:",
    "",
    "- text outside of groups that is no comment (gfortran skips it), also behind the closing `/`;",
    "- the same group twice (gfortran reads the first), and a variable or array element assigned twice (the",
    "  last wins);",
    "- a group without its closing `/` (gfortran may take `&end...` with any letters behind it);",
    "- a name without `=` at the end of a group;",
    "- separators before the first variable of a group, and a null value beyond a variable's end (`x = 3,,`);",
    "- logicals with anything behind them (`.truly.`, `Tea`), unquoted strings, even where they are numbers;",
    "- strings that do not fit (gfortran cuts them), control characters in strings, infinities and NaN;",
    "- substrings `s(2:3)`, components `a%b`, arrays of more than one dimension, names broken by a line's end;",
    "- `?` queries, and decks of more than 1 MiB.",
    "",
    "## Variables",
    NULL};

/* A cell of a table: bars would end it. */
static void cell(FILE *out, const char *text) {
  for (; *text; text++) fprintf(out, "%s%c", *text == '|' ? "\\" : "", *text);
  fprintf(out, " | ");
}

static void markdown_variable(const vd_variable *v, FILE *out) {
  char text[600];
  fprintf(out, "| ");
  snprintf(text, sizeof text, "`%s`", v->name);
  cell(out, text);
  snprintf(text, sizeof text, "`%s`", v->preset);
  cell(out, text);
  vd_variable_allowed(v, text, sizeof text);
  cell(out, text);
  cell(out, v->unit);
  fprintf(out, "%s", v->doc);
  if (*v->flag) fprintf(out, " Fairseq's flag: `%s`.", v->flag);
  fprintf(out, " |\n");
}

void vd_settings_markdown(FILE *out) {
  for (size_t i = 0; preface[i]; i++) fprintf(out, "%s\n", preface[i]);
  for (size_t g = 0; g < vd_n_groups; g++) {
    fprintf(out, "\n### &%s\n\n%s\n\n", vd_groups[g].name, vd_groups[g].doc);
    fprintf(out, "| name | default | allowed | unit | meaning |\n|---|---|---|---|---|\n");
    for (size_t i = 0; i < vd_n_variables; i++)
      if (strcmp(vd_variables[i].group, vd_groups[g].name) == 0) markdown_variable(&vd_variables[i], out);
  }
}
