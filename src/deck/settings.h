/* The main header of src/deck/: a deck becomes settings.
 *
 * A deck (a Fortran namelist file, or the settings stored in a checkpoint) and the --set arguments come in; one
 * vd_settings, checked, goes out, with its choices as enums of base/choices.h. The parser (namelist*.c) knows nothing
 * of Viaduct. settings_table.c holds one row for each variable: group, name, type, default, allowed range or choices,
 * unit, documentation. Reading and checking (settings.c), the rules between variables (settings_rules.c), the echo in
 * every output file (settings_text.c), `viaduct input` and doc/INPUT.md (settings_doc.c) work from these rows.
 * Nothing here is collective: main broadcasts what rank 0 reads. Errors are VD_USAGE and name their place. */
#ifndef VD_SETTINGS_H
#define VD_SETTINGS_H

#include "src/base/choices.h"
#include "src/base/error.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum { VD_TEXT = 256, VD_PATH = 1024, VD_VARIABLES = 112 /* room for the rows of the table */ };

/* Where a variable got its value, for messages about rules between variables. */
typedef struct vd_source {
  int line, column; /* line 0: the default */
  bool command;     /* --set, not the deck */
} vd_source;

typedef struct vd_settings {
  struct {
    char title[VD_TEXT];
    char directory[VD_PATH]; /* everything a run writes goes here */
    int64_t seed;
    int64_t max_updates;
    char resume[VD_PATH];     /* 'auto', 'never', or a checkpoint's path */
    char start_from[VD_PATH]; /* checkpoint whose parameters begin a new run; '': none */
    int64_t log_interval;     /* updates between log lines */
    enum vd_progress_style progress;
  } run;
  struct {
    char path[VD_PATH]; /* the corpus NAME.h5 */
    int64_t tokens_per_sample;
    int64_t batch_streams; /* global, shared out over the ranks */
    int64_t micro_streams; /* streams of a rank computed at once; 0: all of them */
    int64_t read_ahead;    /* blocks a rank reads ahead of use */
  } data;
  struct {
    enum vd_arch arch;
    int64_t n_layer, d_model, n_head, d_head /* 0: d_model/n_head */, d_inner;
    double dropout, emb_dropout;
    double dropatt; /* transformer_xl */
    bool untie_r;   /* transformer_xl */
    enum vd_init init;
  } model;
  struct {
    int64_t attn_span, ramp;
    double init; /* initial span as a fraction of attn_span */
    bool per_layer;
    double aux_loss_scaler;
    enum vd_softmax softmax;
  } span;
  struct { /* transformer_xl */
    int64_t mem_len;
    int64_t clamp_len; /* <= 0: none */
    bool same_length;
    enum vd_initial_memory initial;
  } memory;
  struct {
    enum vd_method method;
    double lr, min_lr;
    double eps; /* 0: the method's own */
    double beta1, beta2;
    enum vd_schedule schedule;
    int64_t warmup_updates;
    double clip_step; /* 0: off */
    double clip_norm; /* 0: off; on the global gradient norm */
  } optimizer;
  struct {
    int64_t interval, streams, max_blocks; /* interval 0: never; max_blocks 0: the whole split */
    enum vd_split split;
  } valid;
  struct {
    int64_t interval, keep;
    bool compress;
  } checkpoint;
  struct {
    int64_t interval; /* updates between rows of the trace */
    double max_age;   /* seconds between two writes of trace.h5 */
  } trace;
  struct {
    enum vd_backend backend;
    enum vd_precision precision;
    enum vd_comm comm;
    enum vd_shard_optimizer shard_optimizer;
    int64_t bucket_bytes;      /* gradients summed at once */
    double timeout;            /* seconds; 0: none */
    char timeline[VD_PATH];    /* '': none */
    double loss_scale;         /* the first one, of fp16 */
    int64_t loss_scale_window; /* updates */
    int64_t threads;           /* OpenMP threads of a rank; 0: as the environment says, else cores / local ranks */
  } device;
  struct {
    char checkpoint[VD_PATH]; /* '': best.h5 of run%directory, else last.h5 */
    enum vd_split split;
    int64_t streams, tokens_per_sample;
    int64_t max_blocks;
    char nll_file[VD_PATH];       /* '': none */
    char attention_file[VD_PATH]; /* '': none */
    int64_t attention_positions;
    char attention_at[VD_PATH]; /* whole numbers with blanks between; '': evenly spread ones */
  } eval;
  struct {
    char checkpoint[VD_PATH];
    char prompt[VD_PATH];      /* with escapes; '': prompt_file */
    char prompt_file[VD_PATH]; /* '': prompt */
    int64_t tokens;            /* at most, of each sample */
    int64_t samples, micro_samples;
    double temperature;   /* 0: always the likeliest */
    int64_t top_k;        /* 0: all */
    double top_p;         /* 1: all */
    int64_t seed;         /* -1: run.seed */
    char stop[VD_PATH];   /* with escapes; '': none */
    char output[VD_PATH]; /* '': standard output */
  } generate;
  struct {
    char input[VD_PATH], output[VD_PATH];
    char checkpoint[VD_PATH]; /* '': best.h5 of run%directory, else last.h5 */
    int64_t streams, group;   /* streams 0: by the length of the file */
    bool ignore_build;
  } compress;
  struct {
    char source[VD_PATH];                                              /* raw bytes; plain, .zip, .gz, .xz */
    char train_text[VD_PATH], valid_text[VD_PATH], test_text[VD_PATH]; /* or three pre-tokenised text files */
    double train, valid, test; /* >= 1: tokens; < 1: fraction of the source; default 90e6, 5e6, 5e6 */
    char vocabulary[VD_PATH];  /* 'found', 'bytes', or the path of a corpus or checkpoint */
    int64_t shard_tokens;
    int64_t deflate; /* 0: off; 1..9 */
    bool overwrite;  /* replace an existing corpus made from something else */
  } prepare;
  char origin[VD_PATH];           /* the deck's name */
  vd_source source[VD_VARIABLES]; /* by row of the table */
} vd_settings;

/* Not collective. Fills *s with the table's defaults. */
void vd_settings_default(vd_settings *s);

/* Not collective. Fills *s with the defaults, reads the deck at `path` over them (whole file parsed before anything is
 * applied), then the n_set assignments "GROUP%NAME=VALUE" of the command line, of which the last wins, then checks
 * every range and vd_settings_check(command). A string's VALUE may come without quotes, since shells eat them. Errors,
 * after which *s is as it was: VD_USAGE with a line for each (at most 20) that names file, line and column or the
 * --set, variable, nearest known name, allowed range, in the order of places; VD_FAILED when the file cannot be read.
 * Behind a place that is no namelist reading continues with the next line that begins an assignment or a group. The
 * rules between variables are checked once all values are right. */
int vd_settings_read(vd_settings *s, const char *path, char *const *set, int n_set, const char *command, vd_error *err);

/* Not collective. Checks the rules between variables and, unless command is NULL, what only matters to one command
 * ("prepare", "train", "eval", "generate", "compress", "decompress"): e.g. train needs data%path. Another word is a
 * bug. VD_USAGE with the variables and, where one came from the deck, its place. */
int vd_settings_check(const vd_settings *s, const char *command, vd_error *err);

/* Not collective. The resolved deck as namelist text that vd_settings_read reads back to the same settings (decimal
 * floats with 17 digits where needed). Caller frees. */
char *vd_settings_echo(const vd_settings *s);

/* Not collective. As vd_settings_read, from namelist text (an echo out of a file); `origin` names it in errors. */
int vd_settings_read_text(vd_settings *s, const char *text, const char *origin, vd_error *err);

/* Not collective. Human help for one variable ("group%name"), one group ("group"), or all (NULL), to `out`.
 * VD_USAGE with the nearest name when it is unknown. */
int vd_settings_help(const char *what, FILE *out, vd_error *err);

/* Not collective. doc/INPUT.md as markdown, to `out`. */
void vd_settings_markdown(FILE *out);

#endif
