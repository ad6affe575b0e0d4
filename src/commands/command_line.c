#include "src/commands/command_line.h"

#include "src/deck/settings_table.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_SET = 1000, KEY_CHECK, KEY_MARKDOWN, KEY_VERSION };

/* What each command takes. */
static const struct command {
  const char *name, *argument;
  bool required;
} commands[] = {
    [VD_COMMAND_PREPARE] = {"prepare", "DECK", true},
    [VD_COMMAND_TRAIN] = {"train", "DECK", true},
    [VD_COMMAND_EVAL] = {"eval", "DECK", true},
    [VD_COMMAND_GENERATE] = {"generate", "DECK", true},
    [VD_COMMAND_INPUT] = {"input", "[GROUP%NAME]", false},
    [VD_COMMAND_INFO] = {"info", "FILE", true},
};
enum { N_COMMAND = VD_COMMAND_INFO + 1 };

static const struct argp_option options[] = {
    {"set", KEY_SET, "GROUP%NAME=VALUE", 0, "Set a variable over the deck; may be repeated", 0},
    {"check", KEY_CHECK, NULL, 0, "train, prepare: dry run: what would be done, and what it needs; writes nothing", 0},
    {"markdown", KEY_MARKDOWN, NULL, 0, "input: all variables as markdown", 0},
    {"help", '?', NULL, 0, "Give this help list", -1},
    {"version", KEY_VERSION, NULL, 0, "Print the program's version", -1},
    {0}};

static const char arguments[] = "prepare DECK\ntrain DECK\neval DECK\ngenerate DECK\ninput [GROUP%NAME]\ninfo FILE";
static const char doc[] =
    "Trains and evaluates adaptive-span transformers and Transformer-XL on byte-level text.\v"
    "  prepare   make a corpus of HDF5 shards from raw bytes or tokenised text\n"
    "  train     train a model, or resume a run that stopped\n"
    "  eval      bits per symbol of a split with a checkpoint\n"
    "  generate  text that continues a prompt\n"
    "  input     describe the variables of a deck\n"
    "  info      describe one of the HDF5 files\n"
    "\n"
    "prepare, train and eval run on any number of ranks, under mpirun, srun or alone. Exit status: 0 done; 2 the "
    "command line or the deck is wrong; 75 stopped on a signal after a checkpoint was written: run again to resume; "
    "1 anything else.";

/* What the parser gathers. */
struct parse {
  vd_command_line *line;
  vd_error *err;
  int n_argument;
  const char *word; /* the first argument: the command */
  int stopped;      /* argv[stopped - 1] could not be parsed */
};

static error_t parse_option(int key, char *value, struct argp_state *state) {
  struct parse *p = state->input;
  switch (key) {
  case KEY_SET:
    p->line->set[p->line->n_set++] = value;
    return 0;
  case KEY_CHECK:
    p->line->check = true;
    return 0;
  case KEY_MARKDOWN:
    p->line->markdown = true;
    return 0;
  case '?':
    p->line->command = VD_COMMAND_HELP;
    return 0;
  case KEY_VERSION:
    p->line->command = VD_COMMAND_VERSION;
    return 0;
  case ARGP_KEY_ARG:
    p->n_argument++;
    if (p->n_argument == 1) p->word = value;
    if (p->n_argument == 2) p->line->argument = value;
    if (p->n_argument == 3) vd_fail(p->err, VD_USAGE, "'%s' is one argument too many", value);
    return 0;
  case ARGP_KEY_ERROR:
    p->stopped = state->next;
    return 0;
  default:
    return ARGP_ERR_UNKNOWN;
  }
}

static const struct argp parser = {options, parse_option, arguments, doc, NULL, NULL, NULL};

void vd_command_line_help(FILE *out) {
  char name[] = "viaduct";
  argp_help(&parser, out, ARGP_HELP_STD_HELP & ~(unsigned)(ARGP_HELP_EXIT_ERR | ARGP_HELP_EXIT_OK), name);
}

static int find_command(vd_command_line *line, const char *word, vd_error *err) {
  int nearest = 0, distance = 1000;
  for (int i = 0; i < N_COMMAND; i++) {
    if (strcmp(word, commands[i].name) == 0) {
      line->command = (enum vd_command)i;
      line->name = commands[i].name;
      return VD_OK;
    }
    int d = vd_edit_distance(word, commands[i].name);
    if (d < distance) distance = d, nearest = i;
  }
  return vd_fail(err, VD_USAGE, "no command '%s'; the nearest is '%s' (see viaduct --help)", word,
                 commands[nearest].name);
}

static int check(const vd_command_line *line, vd_error *err) {
  const struct command *c = &commands[line->command];
  if (c->required && !line->argument)
    return vd_fail(err, VD_USAGE, "viaduct %s %s: the %s is missing", c->name, c->argument,
                   line->command == VD_COMMAND_INFO ? "file" : "deck");
  if (line->check && line->command != VD_COMMAND_TRAIN && line->command != VD_COMMAND_PREPARE)
    return vd_fail(err, VD_USAGE, "--check is for train and prepare, not for %s", c->name);
  if (line->markdown && line->command != VD_COMMAND_INPUT)
    return vd_fail(err, VD_USAGE, "--markdown is for input, not for %s", c->name);
  if (line->markdown && line->argument)
    return vd_fail(err, VD_USAGE, "--markdown lists all variables: '%s' is too much", line->argument);
  if (line->n_set && line->command > VD_COMMAND_GENERATE)
    return vd_fail(err, VD_USAGE, "--set is for commands that read a deck, not for %s", c->name);
  return VD_OK;
}

int vd_command_line_parse(vd_command_line *line, int argc, char **argv, vd_error *err) {
  *line = (vd_command_line){.command = VD_COMMAND_INPUT, .set = vd_calloc((size_t)argc, sizeof *line->set)};
  struct parse p = {.line = line, .err = err};
  /* argp would print its messages on every rank: it is kept silent, and the word that it did not know is named here. */
  line->command = (enum vd_command) - 1;
  error_t failed = argp_parse(&parser, argc, argv, ARGP_NO_EXIT | ARGP_NO_ERRS | ARGP_NO_HELP, NULL, &p);
  if (failed) {
    const char *word = p.stopped > 0 ? argv[p.stopped - 1] : "";
    if (strcmp(word, "--set") == 0) return vd_fail(err, VD_USAGE, "--set wants GROUP%%NAME=VALUE after it");
    return vd_fail(err, VD_USAGE, "the option '%s' is unknown or incomplete (see viaduct --help)", word);
  }
  if (line->command == VD_COMMAND_HELP || line->command == VD_COMMAND_VERSION) return VD_OK;
  if (!p.word) return vd_fail(err, VD_USAGE, "no command given (see viaduct --help)");
  if (find_command(line, p.word, err)) return err->status;
  return err->status ? err->status : check(line, err);
}
