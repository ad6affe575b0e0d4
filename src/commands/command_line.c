#include "src/commands/command_line.h"

#include "src/deck/settings_table.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_SET = 1000, KEY_CHECK, KEY_MARKDOWN, KEY_MAN, KEY_COMPLETION };

#define SET "  --set GROUP%NAME=VALUE  set a variable over the deck; may be repeated\n"
#define CHECK "  --check                 dry run: what would be done, and what it needs; writes nothing\n"

const vd_command_row vd_command_rows[] = {
    [VD_COMMAND_PREPARE] = {"prepare", "DECK", true, false, SET CHECK,
                            "Makes a corpus of HDF5 shards, data%path, from raw bytes (plain or packed) or from "
                            "tokenised text.\nVariables: &prepare, &data. Runs on any number of ranks."},
    [VD_COMMAND_TRAIN] = {"train", "DECK", true, false, SET CHECK,
                          "Trains a model in run%directory, or resumes the run there from its newest checkpoint. A "
                          "signal (USR1, TERM, INT,\nHUP) ends it with a checkpoint and exit status 75: the same "
                          "command resumes.\nVariables: &run, &data, &model, &span or &memory, &optimizer, &valid, "
                          "&checkpoint, &trace, &device. Runs on any number of\nranks."},
    [VD_COMMAND_EVAL] = {"eval", "DECK", true, false, SET,
                         "Prints bits per symbol of a split with a checkpoint: eval%checkpoint, else best.h5 or "
                         "last.h5 of run%directory.\nVariables: &eval, data%path, run%directory; the deck of the "
                         "training will do. Runs on any number of ranks."},
    [VD_COMMAND_GENERATE] =
        {"generate", "DECK", true, false, SET,
         "Continues generate%prompt or generate%prompt_file with a checkpoint: generate%checkpoint, else best.h5 or "
         "last.h5 of run%directory.\nVariables: &generate, data%path, run%directory."},
    [VD_COMMAND_COMPRESS] = {"compress", "DECK", true, false, SET,
                             "Packs the file compress%input into compress%output with the predictions of a model: "
                             "compress%checkpoint, else "
                             "best.h5 or\nlast.h5 of run%directory.\nVariables: &compress, run%directory; the deck of "
                             "the training will do. "
                             "Runs on any number of ranks, on CPUs, with one\nthread each."},
    [VD_COMMAND_DECOMPRESS] =
        {"decompress", "DECK", true, false, SET,
         "Unpacks what `viaduct compress` wrote, with the same checkpoint, program and BLAS, on any number of "
         "ranks.\nVariables: &compress, run%directory."},
    [VD_COMMAND_INPUT] = {"input", "[GROUP%NAME]", false, false, "  --markdown  all variables as markdown\n",
                          "Describes the variables of a deck: all of them, those of a GROUP, or one."},
    [VD_COMMAND_INFO] = {"info", "FILE...", true, true, "",
                         "Verifies and describes files: corpora, shards, checkpoints, traces, nll and attention files, "
                         "packed files, or the folder "
                         "of a run. The exit status\nis the worst of all."},
};
enum { N_COMMAND = VD_COMMAND_INFO + 1 };
const int vd_n_command_rows = N_COMMAND;

static const struct argp_option options[] = {
    {"set", KEY_SET, "GROUP%NAME=VALUE", 0, "Set a variable over the deck; may be repeated", 0},
    {"check", KEY_CHECK, NULL, 0, "train, prepare: dry run: what would be done, and what it needs; writes nothing", 0},
    {"markdown", KEY_MARKDOWN, NULL, 0, "input: all variables as markdown", 0},
    {"man", KEY_MAN, NULL, 0, "help: the man page, as roff", 0},
    {"completion", KEY_COMPLETION, NULL, 0, "help: a script that completes command lines in bash", 0},
    {"help", 'h', NULL, 0, "Give this help list, or that of a command", -1},
    {NULL, '?', NULL, OPTION_ALIAS | OPTION_HIDDEN, NULL, -1},
    {"version", 'V', NULL, 0, "Print the program's version", -1},
    {0}};

static const char arguments[] = "prepare DECK\ntrain DECK\neval DECK\ngenerate DECK\ncompress DECK\ndecompress "
                                "DECK\ninput [GROUP%NAME]\ninfo FILE...\nhelp [COMMAND]";
static const char doc[] =
    "Trains and evaluates adaptive-span transformers and Transformer-XL on byte-level text.\v"
    "  prepare   make a corpus of HDF5 shards from raw bytes or tokenised text\n"
    "  train     train a model, or resume a run that stopped\n"
    "  eval      bits per symbol of a split with a checkpoint\n"
    "  generate  text that continues a prompt\n"
    "  compress  pack a file with the predictions of a model\n"
    "  decompress  unpack it\n"
    "  input     describe the variables of a deck\n"
    "  info      verify and describe HDF5 files, or the folder of a run\n"
    "  help      describe a command\n"
    "\n"
    "All commands with a deck run on any number of ranks, under mpirun, srun or alone. Exit status: 0 done; 2 the "
    "command line or the deck is wrong; 75 stopped on a signal after a checkpoint was written: run again to resume; "
    "1 anything else.";
static const char short_usage[] =
    "usage: viaduct prepare|train|eval|generate|compress|decompress DECK [--set GROUP%NAME=VALUE]... [--check]\n"
    "       viaduct input [GROUP%NAME]\n"
    "       viaduct info FILE...\n"
    "       viaduct help [COMMAND]";

/* What the parser gathers. */
struct parse {
  vd_command_line *line;
  bool help, version;
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
  case KEY_MAN:
    p->line->man = true;
    return 0;
  case KEY_COMPLETION:
    p->line->completion = true;
    return 0;
  case 'h':
  case '?':
    p->help = true;
    return 0;
  case 'V':
    p->version = true;
    return 0;
  case ARGP_KEY_ARG:
    if (p->word)
      p->line->arguments[p->line->n_argument++] = value;
    else
      p->word = value;
    return 0;
  case ARGP_KEY_ERROR:
    p->stopped = state->next;
    return 0;
  default:
    return ARGP_ERR_UNKNOWN;
  }
}

static const struct argp parser = {options, parse_option, arguments, doc, NULL, NULL, NULL};

void vd_command_line_help(const vd_command_line *line, FILE *out) {
  char name[] = "viaduct";
  if (!line->name) {
    argp_help(&parser, out, ARGP_HELP_STD_HELP & ~(unsigned)(ARGP_HELP_EXIT_ERR | ARGP_HELP_EXIT_OK), name);
    return;
  }
  const vd_command_row *c = vd_command_rows;
  while (strcmp(c->name, line->name) != 0) c++;
  fprintf(out, "Usage: viaduct %s %s%s\n\n%s\n", c->name, c->argument, c->options[0] ? " [OPTION]..." : "", c->doc);
  if (c->options[0]) fprintf(out, "\n%s", c->options);
}

static int find_command(vd_command_line *line, const char *word, vd_error *err) {
  int nearest = 0, distance = 1000;
  for (int i = 0; i < N_COMMAND; i++) {
    if (strcmp(word, vd_command_rows[i].name) == 0) {
      line->command = (enum vd_command)i;
      line->name = vd_command_rows[i].name;
      return VD_OK;
    }
    int d = vd_edit_distance(word, vd_command_rows[i].name);
    if (d < distance) distance = d, nearest = i;
  }
  return vd_fail(err, VD_USAGE, "no command '%s'; the nearest is '%s' (see viaduct --help)", word,
                 vd_command_rows[nearest].name);
}

static int check(const vd_command_line *line, vd_error *err) {
  const vd_command_row *c = &vd_command_rows[line->command];
  if (c->required && line->n_argument == 0)
    return vd_fail(err, VD_USAGE, "viaduct %s %s: the %s is missing", c->name, c->argument,
                   line->command == VD_COMMAND_INFO ? "file" : "deck");
  if (line->n_argument > 1 && !c->many)
    return vd_fail(err, VD_USAGE, "'%s' is one argument too many", line->arguments[1]);
  if (line->check && line->command != VD_COMMAND_TRAIN && line->command != VD_COMMAND_PREPARE)
    return vd_fail(err, VD_USAGE, "--check is for train and prepare, not for %s", c->name);
  if (line->markdown && line->command != VD_COMMAND_INPUT)
    return vd_fail(err, VD_USAGE, "--markdown is for input, not for %s", c->name);
  if (line->markdown && line->n_argument > 0)
    return vd_fail(err, VD_USAGE, "--markdown lists all variables: '%s' is too much", line->arguments[0]);
  if (line->n_set && line->command > VD_COMMAND_DECOMPRESS)
    return vd_fail(err, VD_USAGE, "--set is for commands that read a deck, not for %s", c->name);
  if (line->man || line->completion)
    return vd_fail(err, VD_USAGE, "%s is for help, not for %s", line->man ? "--man" : "--completion", c->name);
  return VD_OK;
}

/* `viaduct help`, `viaduct help COMMAND`, and --help with or without a command. */
static int ask_help(vd_command_line *line, const char *word, vd_error *err) {
  if (word && strcmp(word, "help") == 0) {
    if (line->n_argument > 1) return vd_fail(err, VD_USAGE, "'%s' is one argument too many", line->arguments[1]);
    word = line->n_argument > 0 ? line->arguments[0] : NULL;
  }
  if (word && find_command(line, word, err)) return err->status;
  if (line->man && line->completion) return vd_fail(err, VD_USAGE, "--man and --completion exclude each other");
  if (word && (line->man || line->completion))
    return vd_fail(err, VD_USAGE, "%s covers all commands: '%s' is too much", line->man ? "--man" : "--completion",
                   word);
  line->command = VD_COMMAND_HELP;
  return VD_OK;
}

int vd_command_line_parse(vd_command_line *line, int argc, char **argv, vd_error *err) {
  *line = (vd_command_line){.command = VD_COMMAND_HELP,
                            .set = vd_calloc((size_t)argc, sizeof *line->set),
                            .arguments = vd_calloc((size_t)argc, sizeof *line->arguments)};
  struct parse p = {.line = line};
  /* argp would print its messages on every rank: it is kept silent, and the word that it did not know is named here. */
  error_t failed = argp_parse(&parser, argc, argv, ARGP_NO_EXIT | ARGP_NO_ERRS | ARGP_NO_HELP, NULL, &p);
  if (failed) {
    const char *word = p.stopped > 0 ? argv[p.stopped - 1] : "";
    if (strcmp(word, "--set") == 0) return vd_fail(err, VD_USAGE, "--set wants GROUP%%NAME=VALUE after it");
    return vd_fail(err, VD_USAGE, "the option '%s' is unknown or incomplete (see viaduct --help)", word);
  }
  if (p.version) {
    line->command = VD_COMMAND_VERSION;
    return VD_OK;
  }
  if (p.help || (p.word && strcmp(p.word, "help") == 0)) return ask_help(line, p.word, err);
  if (!p.word) return vd_fail(err, VD_USAGE, "no command given\n%s", short_usage);
  if (find_command(line, p.word, err)) return err->status;
  return check(line, err);
}
