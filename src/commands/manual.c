#include "src/commands/manual.h"

#include "src/base/version.h"
#include "src/commands/command_line.h"
#include "src/deck/settings_table.h"

#include <string.h>

/* When the sections that are written out below changed last: a man page names a date. */
#define DATE "2026-11-28"

/* ---- man page ---- */

/* One word with the characters that roff would change or take for its own. */
static void roff_word(FILE *out, const char *word, int n) {
  for (int i = 0; i < n; i++) {
    switch (word[i]) {
    case '\\':
      fputs("\\e", out);
      break;
    case '\'':
      fputs("\\(aq", out);
      break;
    case '`':
      fputs("\\(ga", out);
      break;
    case '^':
      fputs("\\(ha", out);
      break;
    case '~':
      fputs("\\(ti", out);
      break;
    case '-':
      fputs("\\-", out);
      break;
    case '.':
      fputs(i == 0 ? "\\&." : ".", out);
      break;
    default:
      fputc(word[i], out);
    }
  }
}

/* How many characters roff_word() writes. */
static int roff_width(const char *word, int n) {
  int width = n;
  for (int i = 0; i < n; i++) width += strchr("'`^~", word[i]) ? 3 : strchr("\\-", word[i]) ? 1 : 0;
  return width + (*word == '.' ? 2 : 0);
}

/* Text in lines of at most 78 characters, so that the source of the page can be read too. Newlines are blanks. */
static void roff(FILE *out, const char *text) {
  int column = 0;
  text += strspn(text, " \n");
  while (*text) {
    int n = (int)strcspn(text, " \n"), width = roff_width(text, n);
    bool fits = column + 1 + width <= 78;
    if (column > 0) fputc(fits ? ' ' : '\n', out);
    column = column > 0 && fits ? column + 1 + width : width;
    roff_word(out, text, n);
    text += n;
    text += strspn(text, " \n");
  }
  fputc('\n', out);
}

/* The term of a list. */
static void term(FILE *out, const char *bold, const char *rest) {
  fputs(".TP\n\\fB", out);
  roff_word(out, bold, (int)strlen(bold));
  fputs(*rest ? "\\fR " : "\\fR", out);
  roff(out, rest);
}

static void manual_variable(const vd_variable *v, FILE *out) {
  char text[700], allowed[512];
  snprintf(text, sizeof text, "%s%%%s", v->group, v->name);
  fputs(".TP\n\\fB", out);
  roff_word(out, text, (int)strlen(text));
  fputs("\\fR = ", out);
  roff_word(out, v->preset, (int)strlen(v->preset));
  fputc('\n', out);
  roff(out, v->doc);
  vd_variable_allowed(v, allowed, sizeof allowed);
  snprintf(text, sizeof text, "Allowed: %s%s%s.", allowed, *v->unit ? "; unit: " : "", v->unit);
  roff(out, text);
}

static void manual_commands(FILE *out) {
  fputs(".SH COMMANDS\n", out);
  for (int i = 0; i < vd_n_command_rows; i++) {
    const vd_command_row *c = &vd_command_rows[i];
    term(out, c->name, c->argument);
    roff(out, c->doc);
    /* Each line of the options is "  --name ARGUMENT  meaning". */
    for (const char *line = c->options; *line; line = strchr(line, '\n') + 1) {
      const char *name = line + strspn(line, " "), *end = strstr(name, "  ");
      fputs(".RS\n.TP\n\\fB", out);
      roff_word(out, name, (int)strcspn(name, " \n"));
      fputs("\\fR", out);
      roff_word(out, name + strcspn(name, " \n"), (int)(end - name - (ptrdiff_t)strcspn(name, " \n")));
      fputc('\n', out);
      char meaning[256];
      end += strspn(end, " ");
      snprintf(meaning, sizeof meaning, "%.*s", (int)strcspn(end, "\n"), end);
      roff(out, meaning);
      fputs(".RE\n", out);
    }
  }
  term(out, "help", "[COMMAND]");
  roff(out, "Describes the program or a command, as --help does.");
  fputs(".RS\n", out);
  term(out, "--man", "");
  roff(out, "Prints this page as roff.");
  term(out, "--completion", "");
  roff(out, "Prints a script that completes command lines in bash.");
  fputs(".RE\n", out);
}

static const char *const before_commands =
    ".SH NAME\nviaduct \\- train and evaluate adaptive\\-span transformers and Transformer\\-XL\n"
    ".SH SYNOPSIS\n"
    ".B viaduct\n.I COMMAND DECK\n[\\fB\\-\\-set\\fR "
    "\\fIGROUP\\fR%\\fINAME\\fR=\\fIVALUE\\fR]...\n[\\fB\\-\\-check\\fR]\n"
    ".br\n.B viaduct info\n.IR FILE ...\n"
    ".br\n.B viaduct input\n[\\fIGROUP\\fR%\\fINAME\\fR]\n"
    ".br\n.B viaduct help\n[\\fICOMMAND\\fR]\n"
    ".br\n.B viaduct\n\\fB\\-\\-version\\fR\n"
    ".SH DESCRIPTION\n"
    "Viaduct trains language models on text, byte by byte, and evaluates them in\nbits per symbol (bpc).\n"
    "It runs alone or on many ranks under mpirun or srun, on CPUs and on NVIDIA GPUs.\n"
    "A command reads a deck, a Fortran namelist of variables;\nvariables that the deck leaves out keep their "
    "defaults.\n";

static const char *const after_variables =
    ".SH EXIT STATUS\n"
    ".TP\n0\nDone.\n"
    ".TP\n1\nA file, the machine or the numbers failed; the message says which.\n"
    ".TP\n2\nThe command line or the deck is wrong; nothing was touched.\n"
    ".TP\n75\nTraining stopped on SIGUSR1, SIGTERM, SIGINT or SIGHUP after a checkpoint was\nwritten: the same command "
    "resumes.\n"
    ".SH FILES\n"
    "A run writes\n.IR run%directory /log.jsonl,\ntrace.h5, deck.nml (the resolved deck) and checkpoints/,\nwhere "
    "last.h5 "
    "and best.h5 are links.\nAll but the log and the deck are HDF5.\n"
    ".SH EXAMPLES\n"
    ".nf\n"
    "viaduct prepare prepare.nml\n"
    "mpirun \\-n 2 viaduct train train.nml \\-\\-set run%max_updates=1000\n"
    "viaduct eval train.nml\n"
    "viaduct compress train.nml \\-\\-set compress%input=a.txt \\-\\-set compress%output=a.vdc\n"
    "viaduct input optimizer%lr\n"
    ".fi\n"
    ".SH SEE ALSO\n"
    ".BR mpirun (1),\n.BR h5dump (1)\n"
    ".PP\n"
    "Guide, files and decks: share/doc/viaduct and share/viaduct/input of the\ninstallation.\n";

void vd_manual(FILE *out) {
  fprintf(out, ".\\\" Written by `viaduct help --man`.\n.TH VIADUCT 1 %s \"viaduct %s\" \"User Commands\"\n", DATE,
          vd_version());
  fputs(before_commands, out);
  manual_commands(out);
  fputs(".SH VARIABLES\nEach with its default.\n", out);
  for (size_t g = 0; g < vd_n_groups; g++) {
    fprintf(out, ".SS &%s\n", vd_groups[g].name);
    roff(out, vd_groups[g].doc);
    for (size_t i = 0; i < vd_n_variables; i++)
      if (strcmp(vd_variables[i].group, vd_groups[g].name) == 0) manual_variable(&vd_variables[i], out);
  }
  fputs(after_variables, out);
}

/* ---- completion for bash ---- */

/* bash divides a line into words at '=' too, and replaces only what stands behind it. So the words are taken from the
 * line itself, and what stands before the last '=' is cut off the answers. */
static const char *const script =
    "_viaduct() {\n"
    "  local line=${COMP_LINE:0:COMP_POINT} IFS=$' \\t\\n' before command word whole cut=''\n"
    "  whole=${line##*[[:space:]]} word=$whole\n"
    "  read -ra before <<<\"${line%\"$whole\"}\"\n"
    "  command=${before[1]}\n"
    "  if [[ $word == --set=* ]]; then\n"
    "    before+=(--set)\n"
    "    word=${word#--set=} cut=--set=\n"
    "  fi\n"
    "  COMPREPLY=()\n"
    "  if [[ ${before[-1]} == --set && $word == *=* ]]; then\n"
    "    cut+=${word%%=*}=\n"
    "    _viaduct_values \"${word%%=*}\" \"${word#*=}\"\n"
    "  elif [[ ${before[-1]} == --set ]]; then\n"
    "    compopt -o nospace 2>/dev/null\n"
    "    mapfile -t COMPREPLY < <(compgen -W \"${_viaduct_variables// /= }=\" -- \"$word\")\n"
    "  elif [[ ${#before[@]} == 1 ]]; then\n"
    "    mapfile -t COMPREPLY < <(compgen -W \"$_viaduct_commands help --help --version\" -- \"$word\")\n"
    "  elif [[ $word == -* ]]; then\n"
    "    mapfile -t COMPREPLY < <(compgen -W \"$(_viaduct_options \"$command\") --help\" -- \"$word\")\n"
    "  elif [[ $command == help ]]; then\n"
    "    mapfile -t COMPREPLY < <(compgen -W \"$_viaduct_commands\" -- \"$word\")\n"
    "  elif [[ $command == input ]]; then\n"
    "    mapfile -t COMPREPLY < <(compgen -W \"$_viaduct_groups $_viaduct_variables\" -- \"$word\")\n"
    "  else\n"
    "    _viaduct_files \"$word\"\n"
    "  fi\n"
    "  # Only what follows the last '=' is replaced, where bash takes it for a word of its own.\n"
    "  if [[ -n $cut ]]; then\n"
    "    COMPREPLY=(\"${COMPREPLY[@]/#/$cut}\")\n"
    "    [[ $COMP_WORDBREAKS != *=* ]] || COMPREPLY=(\"${COMPREPLY[@]#\"${whole%\"${whole##*=}\"}\"}\")\n"
    "  fi\n"
    "}\n"
    "_viaduct_files() {\n"
    "  compopt -o filenames 2>/dev/null\n"
    "  mapfile -t COMPREPLY < <(compgen -f -- \"$1\")\n"
    "}\n"
    "complete -F _viaduct viaduct\n";

static void word_list(FILE *out, const char *name) {
  fprintf(out, "_viaduct_%s='", name);
}

/* What stands behind --set GROUP%NAME= by the type of the variable: choices, logicals, or paths. */
static void completion_values(FILE *out) {
  fputs("_viaduct_values() {\n  case $1 in\n", out);
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    if (v->type == VD_CHOICE)
      fprintf(out, "  %s%%%s) mapfile -t COMPREPLY < <(compgen -W '%s' -- \"$2\") ;;\n", v->group, v->name, v->choices);
    else if (v->type == VD_LOGICAL)
      fprintf(out, "  %s%%%s) mapfile -t COMPREPLY < <(compgen -W '.true. .false.' -- \"$2\") ;;\n", v->group, v->name);
    else if (v->type == VD_STRING && v->size == VD_PATH)
      fprintf(out, "  %s%%%s) _viaduct_files \"$2\" ;;\n", v->group, v->name);
  }
  fputs("  esac\n}\n", out);
}

static void completion_options(FILE *out) {
  fputs("_viaduct_options() {\n  case $1 in\n", out);
  for (int i = 0; i < vd_n_command_rows; i++) {
    const vd_command_row *c = &vd_command_rows[i];
    if (!c->options[0]) continue;
    fprintf(out, "  %s) echo", c->name);
    for (const char *line = c->options; *line; line = strchr(line, '\n') + 1) {
      const char *name = line + strspn(line, " ");
      fprintf(out, " %.*s", (int)strcspn(name, " \n"), name);
    }
    fputs(" ;;\n", out);
  }
  fputs("  help) echo --man --completion ;;\n  esac\n}\n", out);
}

void vd_completion(FILE *out) {
  fputs("# Completion of viaduct's command lines in bash. Written by `viaduct help --completion`.\n"
        "# shellcheck shell=bash\n",
        out);
  word_list(out, "commands");
  for (int i = 0; i < vd_n_command_rows; i++) fprintf(out, "%s%s", i ? " " : "", vd_command_rows[i].name);
  fputs("'\n", out);
  word_list(out, "groups");
  for (size_t g = 0; g < vd_n_groups; g++) fprintf(out, "%s%s", g ? " " : "", vd_groups[g].name);
  fputs("'\n", out);
  word_list(out, "variables");
  for (size_t i = 0; i < vd_n_variables; i++)
    fprintf(out, "%s%s%%%s", i ? " " : "", vd_variables[i].group, vd_variables[i].name);
  fputs("'\n", out);
  completion_options(out);
  completion_values(out);
  fputs(script, out);
}
