/* What a run says at its start and at its end, for people. */
#include "io/checkpoint.h"
#include "src/train/train.h"

#include <errno.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { LABEL = -11, LONGEST = 120 /* of a list of hosts or devices */ };
static const double VD_MIB = 1048576.0;

/* "1,234,567", into text [32]. */
static const char *grouped(int64_t n, char text[32]) {
  char digits[24];
  int length = snprintf(digits, sizeof digits, "%lld", (long long)n), used = 0;
  for (int i = 0; i < length; i++) {
    if (i > 0 && (length - i) % 3 == 0 && digits[i - 1] != '-') text[used++] = ',';
    text[used++] = digits[i];
  }
  text[used] = '\0';
  return text;
}

/* A row "LABEL  LIST", cut where the list is long. */
static void print_list(const char *label, const char *before, const char *list, const char *after) {
  bool cut = strlen(list) > LONGEST;
  printf("  %*s %s%.*s%s%s\n", LABEL, label, before, LONGEST, list, cut ? " ..." : "", after);
}

static void print_devices(const vd_train *t) {
  const vd_run_facts *f = &t->facts;
  char before[128], after[128] = "";
  snprintf(before, sizeof before, "%d x %d thread%s on %d host%s: ", f->ranks, f->threads, f->threads > 1 ? "s" : "",
           f->n_host, f->n_host > 1 ? "s" : "");
  print_list("ranks", before, f->hosts, "");
  int v = t->device.nccl_version;
  if (t->device.comm == VD_COMM_NCCL)
    snprintf(after, sizeof after, "; %s; gradients all-reduced by NCCL %d.%d.%d", f->precision, v / 10000,
             v / 100 % 100, v % 100);
  else
    snprintf(after, sizeof after, "; %s%s", f->precision, f->ranks > 1 ? "; gradients all-reduced by MPI" : "");
  size_t used = strlen(after);
  if (f->ranks > 1 && vd_configure_is_sharded(t->settings, &t->device))
    snprintf(after + used, sizeof after - used, "; optimizer sharded");
  print_list("devices", "", f->devices, after);
}

static void print_start(const vd_train *t) {
  const vd_settings *s = t->settings;
  printf("  %*s %s: %lld updates\n", LABEL, "run", s->run.directory, (long long)s->run.max_updates);
  if (t->resume.path[0])
    printf("  %*s resumes after update %lld of %s\n", LABEL, "start", (long long)t->resume.update, t->resume.path);
  else if (t->start.path[0])
    printf("  %*s from the parameters of %s\n", LABEL, "start", t->start.path);
  else
    printf("  %*s from initial parameters, seed %lld\n", LABEL, "start", (long long)s->run.seed);
}

static void print_memory(const vd_train *t) {
  const vd_model_config *c = &t->config;
  int64_t streams = vd_stream_greatest_share(t->geometry.n_stream, t->ctx->size);
  vd_train_need need;
  bool xl = c->arch == VD_TRANSFORMER_XL;
  double first = vd_train_memory(t, streams, vd_train_first_window(c), &need) / VD_MIB;
  printf("  %*s %.0f MiB a rank%s", LABEL, "memory", first, xl ? "" : " at the first spans");
  if (!xl) printf(", %.0f MiB with all spans full", vd_train_memory(t, streams, c->attn_span, &need) / VD_MIB);
  printf("\n");
}

void vd_train_print_header(const vd_train *t) {
  const vd_settings *s = t->settings;
  const vd_run_facts *f = &t->facts;
  const vd_model_config *c = &t->config;
  char n[4][32];
  printf("viaduct %s (%s)\n  %*s %s%s%s\n", f->version, f->git, LABEL, "deck", s->origin, s->run.title[0] ? ": " : "",
         s->run.title);
  print_start(t);
  print_devices(t);
  printf("  %*s %s, %lld layers of %lld heads, width %lld: %s parameters\n", LABEL, "model",
         c->arch == VD_TRANSFORMER_XL ? "Transformer-XL" : "adaptive span", (long long)c->n_layer, (long long)c->n_head,
         (long long)c->d_model, grouped(f->parameters, n[0]));
  printf("  %*s %s: %lld symbols; tokens: train %s, valid %s, test %s\n", LABEL, "corpus", s->data.path,
         (long long)c->vocab, grouped(f->tokens[VD_SPLIT_TRAIN], n[1]), grouped(f->tokens[VD_SPLIT_VALID], n[2]),
         grouped(f->tokens[VD_SPLIT_TEST], n[3]));
  printf("  %*s %lld streams of blocks of %lld tokens: %lld updates an epoch\n", LABEL, "update",
         (long long)t->geometry.n_stream, (long long)t->geometry.block, (long long)t->blocks);
  print_memory(t);
  fflush(stdout);
}

/* A word of a command line, in quotes where a shell would split or expand it. */
static void print_word(const char *word) {
  static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./%+=:,@-";
  if (word[0] && word[strspn(word, plain)] == '\0') {
    fputs(word, stdout);
    return;
  }
  putchar('\'');
  for (const char *p = word; *p; p++)
    if (*p == '\'')
      fputs("'\\''", stdout);
    else
      putchar(*p);
  putchar('\'');
}

/* A script of doc/analysis beside the program: of the sources that it was built in, or as installed. "": it is not
 * there. */
static void find_script(const char *name, char *path, size_t size) {
  static const char *const places[] = {"doc/analysis", "share/viaduct/analysis"};
  char program[VD_PATH];
  ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
  snprintf(path, size, "doc/analysis/%s", name);
  if (access(path, R_OK) == 0) return;
  path[0] = '\0';
  if (n <= 0) return;
  program[n] = '\0';
  const char *parent = dirname(dirname(program));
  for (int i = 0; i < 2; i++) {
    snprintf(path, size, "%s/%s/%s", parent, places[i], name);
    if (access(path, R_OK) == 0) return;
  }
  path[0] = '\0';
}

static void print_next(const vd_train *t) {
  static const char *const scripts[][2] = {{"plot", "plot_run.py"}, {"report", "report.py"}};
  char path[VD_PATH + 64];
  snprintf(path, sizeof path, "%s/deck.nml", t->settings->run.directory);
  printf("  %*s ", LABEL, "evaluate");
  print_word(program_invocation_name);
  printf(" eval ");
  print_word(path);
  for (int i = 0; i < 2; i++) {
    find_script(scripts[i][1], path, sizeof path);
    if (!path[0]) continue;
    printf("\n  %*s python3 ", LABEL, scripts[i][0]);
    print_word(path);
    putchar(' ');
    print_word(t->settings->run.directory);
  }
  printf("\n");
}

void vd_train_print_summary(const vd_train *t, bool stopped) {
  const vd_progress *p = &t->progress;
  char wall[24], part[24], path[VD_PATH + 64];
  int64_t done = p->update - t->resume.update, last = t->settings->run.max_updates;
  vd_log_duration(vd_log_wall(t->log), wall);
  vd_log_duration(t->total.seconds, part);
  if (stopped)
    vd_log_message(t->log, "stopped by a signal after update %lld of %lld; %s is written: run again to continue",
                   (long long)p->update, (long long)last, t->last_good);
  else
    vd_log_message(t->log, "done: %lld updates in %s", (long long)p->update, wall);
  printf("  %*s %lld updates%s, %s of training at %.0f tokens/s\n", LABEL, "speed", (long long)done,
         t->resume.path[0] ? " since the run was resumed" : "", part,
         t->total.seconds > 0 ? t->total.targets / t->total.seconds : 0.0);
  if (p->best_update > 0) {
    vd_checkpoint_path(t->settings->run.directory, p->best_update, path, sizeof path);
    printf("  %*s valid bpc %.4f after update %lld: %s\n", LABEL, "best", p->best_bpc, (long long)p->best_update, path);
  } else {
    printf("  %*s no validation yet; the newest checkpoint is %s\n", LABEL, "best", t->last_good);
  }
  if (stopped)
    printf("  %*s the same command resumes there, on any number of ranks; wall time so far: %s\n", LABEL, "continue",
           wall);
  else
    print_next(t);
  fflush(stdout);
}
