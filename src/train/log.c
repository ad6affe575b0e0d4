#include "src/train/log.h"

#include "io/atomic_file.h"
#include "src/base/clock.h"
#include "src/base/regular_file.h"
#include "src/base/terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const double PLAIN_SECONDS = 30.0; /* between two plain lines, at least */

struct vd_log {
  int fd;
  char path[1100];
  FILE *terminal;       /* NULL: say nothing */
  bool is_live;         /* progress is one line that is rewritten in place */
  int line_open;        /* columns of the live line on the screen; 0: there is none */
  double opened, shown; /* monotonic seconds: of vd_log_open(), of the last line of progress; 0: none yet */
  double wall_before;   /* seconds of the run's earlier parts */
  int64_t first_update, max_updates;
};

double vd_log_wall(const vd_log *log) {
  return log ? log->wall_before + vd_clock_seconds() - log->opened : 0.0;
}

/* Copies one line of the old log unless it is a torn last line or of a later update. A line that cannot be read may be
 * the user's own: it stays, with a message. */
static int copy_line(vd_log *log, const char *line, size_t n, int64_t number, int64_t update, vd_error *err) {
  bool whole = line[n - 1] == '\n';
  json_t *row = json_loadb(line, n, 0, NULL);
  json_t *done = json_object_get(row, "num_updates"), *wall = json_object_get(row, "wall");
  bool readable = json_is_integer(done);
  if (readable ? json_integer_value(done) <= update : whole) {
    if (!readable) vd_log_message(log, "%s:%lld cannot be read; it is kept", log->path, (long long)number);
    vd_write_all(log->fd, log->path, line, n, err);
    if (!whole && err->status == VD_OK) vd_write_all(log->fd, log->path, "\n", 1, err);
    if (readable && json_is_number(wall)) log->wall_before = json_number_value(wall);
  }
  json_decref(row);
  return err->status;
}

/* Copies the lines that are to be kept from the old log into the new one. */
static int copy_lines(vd_log *log, FILE *old, int64_t update, vd_error *err) {
  char *line = NULL;
  size_t capacity = 0;
  ssize_t n;
  for (int64_t number = 1; err->status == VD_OK && (n = getline(&line, &capacity, old)) > 0; number++)
    copy_line(log, line, (size_t)n, number, update, err);
  if (ferror(old)) vd_fail(err, VD_FAILED, "cannot read %s", log->path);
  free(line);
  return err->status;
}

/* Replaces the log by one of the lines that are kept. */
static int cut_off(vd_log *log, int64_t update, vd_error *err) {
  vd_atomic_file f;
  FILE *old = NULL;
  int fd;
  if (access(log->path, F_OK) == 0) {
    if (vd_open_regular(log->path, &fd, NULL, err)) return err->status;
    old = fdopen(fd, "r");
    if (!old) close(fd);
    if (!old) return vd_fail(err, VD_FAILED, "cannot read %s: %s", log->path, strerror(errno));
  }
  if (vd_atomic_begin(&f, log->path, err) == VD_OK && vd_atomic_create(&f, O_APPEND, &log->fd, err) == VD_OK &&
      (!old || copy_lines(log, old, update, err) == VD_OK))
    vd_atomic_commit(&f, err);
  if (err->status) vd_atomic_abandon(&f);
  if (old) fclose(old);
  return err->status;
}

int vd_log_open(vd_log **log, const char *directory, int64_t update, int64_t max_updates, FILE *terminal, bool live,
                vd_error *err) {
  vd_log *made = vd_calloc(1, sizeof *made);
  *log = NULL;
  made->fd = -1;
  made->terminal = terminal;
  made->is_live = terminal && live;
  made->opened = vd_clock_seconds();
  made->first_update = update;
  made->max_updates = max_updates;
  if (snprintf(made->path, sizeof made->path, "%s/log.jsonl", directory) >= 1024)
    vd_fail(err, VD_FAILED, "the path is too long: %s", directory);
  else
    cut_off(made, update, err);
  if (err->status) {
    if (made->fd >= 0) close(made->fd);
    free(made);
    return err->status;
  }
  *log = made;
  return VD_OK;
}

/* JSON has no NaN and no infinity. */
static json_t *number(double x) {
  return isfinite(x) ? json_real(x) : json_null();
}

/* Appends the object (whose reference it takes) as one line. */
static int append(vd_log *log, json_t *object, vd_error *err) {
  char *text = object ? json_dumps(object, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9)) : NULL;
  json_decref(object);
  if (!text) return vd_fail(err, VD_FAILED, "cannot put a line for %s together", log->path);
  size_t n = strlen(text);
  text[n] = '\n'; /* in the place of the terminating zero */
  off_t before = lseek(log->fd, 0, SEEK_END);
  if (vd_write_all(log->fd, log->path, text, n + 1, err) == VD_OK && fdatasync(log->fd) != 0)
    vd_fail(err, VD_FAILED, "cannot sync %s: %s", log->path, strerror(errno));
  if (err->status && before >= 0 && ftruncate(log->fd, before) != 0)
    vd_wrap(err, "%s keeps a torn line (%s)", log->path, strerror(errno));
  free(text);
  return err->status;
}

void vd_log_duration(double seconds, char text[24]) {
  long s = seconds > 0.0 && seconds < 1e9 ? lrint(seconds) : 0;
  if (s >= 3600)
    snprintf(text, 24, "%ldh%02ldm", s / 3600, s / 60 % 60);
  else if (s >= 60)
    snprintf(text, 24, "%ldm%02lds", s / 60, s % 60);
  else
    snprintf(text, 24, "%lds", s);
}

/* Blanks out the live line, without the control codes that some terminals do not know. */
static void clear_line(vd_log *log) {
  if (log->line_open > 0) fprintf(log->terminal, "\r%*s\r", log->line_open, "");
  log->line_open = 0;
}

/* A line as wide as the terminal would make some of them wrap: the last column stays empty. */
static void show_live(vd_log *log, const char *text) {
  int width = vd_terminal_width(log->terminal) - 1, length = (int)strlen(text);
  if (length > width) length = width;
  int rest = (log->line_open < width ? log->line_open : width) - length; /* of the line before */
  fprintf(log->terminal, "\r%.*s%*s", length, text, rest > 0 ? rest : 0, "");
  log->line_open = length;
}

static void show(vd_log *log, const vd_log_row *r) {
  char left[24] = "?", text[256];
  int64_t done = r->update - log->first_update;
  if (done > 0)
    vd_log_duration((vd_clock_seconds() - log->opened) / (double)done * (double)(log->max_updates - r->update), left);
  snprintf(text, sizeof text, "update %lld/%lld  bpc %.4f  %.0f tokens/s  %s left  span mean %.1f longest %.0f tokens",
           (long long)r->update, (long long)log->max_updates, r->bpc, r->tokens_per_second, left, r->mean_span,
           r->max_span);
  if (log->is_live)
    show_live(log, text);
  else
    fprintf(log->terminal, "%s\n", text);
  fflush(log->terminal);
  log->shown = vd_clock_seconds();
}

/* Is it time for another plain line? */
static bool plain_is_due(const vd_log *log, const vd_log_row *r) {
  return log->shown == 0.0 || r->update == log->max_updates || vd_clock_seconds() - log->shown >= PLAIN_SECONDS;
}

/* Members that only some runs have. */
static void add_number(json_t *line, const char *name, double x) {
  if (!isnan(x)) json_object_set_new(line, name, number(x));
}

int vd_log_update(vd_log *log, const vd_log_row *r, vd_error *err) {
  if (!log) return VD_OK;
  if (log->terminal && (log->is_live || plain_is_due(log, r))) show(log, r);
  json_t *line =
      json_pack("{s:I,s:I,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "epoch", (json_int_t)r->epoch, "num_updates",
                (json_int_t)r->update, "loss", number(r->bpc + r->span_penalty / M_LN2), "bpc", number(r->bpc), "lr",
                number(r->learning_rate), "gnorm", number(r->grad_norm), "wps", number(r->tokens_per_second),
                "avg_span", number(r->mean_span), "max_span", number(r->max_span), "wall", number(vd_log_wall(log)));
  add_number(line, "data_wait", r->data_wait);
  add_number(line, "sum_share", r->sum_share);
  add_number(line, "mfu", r->mfu);
  add_number(line, "loss_scale", r->loss_scale);
  if (!isnan(r->loss_scale)) json_object_set_new(line, "skipped", json_integer((json_int_t)r->skipped));
  return append(log, line, err);
}

void vd_log_live(vd_log *log, const vd_log_row *row) {
  if (log && log->is_live && vd_clock_seconds() - log->shown >= 0.1) show(log, row);
}

int vd_log_valid(vd_log *log, int64_t update, int64_t epoch, double bpc, bool best, vd_error *err) {
  if (!log) return VD_OK;
  vd_log_message(log, "update %lld: valid bpc %.4f%s", (long long)update, bpc, best ? ", the best so far" : "");
  return append(log,
                json_pack("{s:I,s:I,s:o,s:o}", "epoch", (json_int_t)epoch, "num_updates", (json_int_t)update,
                          "valid_bpc", number(bpc), "wall", number(vd_log_wall(log))),
                err);
}

void vd_log_message(vd_log *log, const char *format, ...) {
  if (!log || !log->terminal) return;
  va_list args;
  va_start(args, format);
  clear_line(log);
  fputs("viaduct: ", log->terminal);
  vfprintf(log->terminal, format, args);
  fputc('\n', log->terminal);
  fflush(log->terminal);
  va_end(args);
  if (log->is_live) log->shown = 0.0; /* so that the live line comes back at once */
}

void vd_log_close(vd_log **log) {
  if (!*log) return;
  if ((*log)->line_open) fputc('\n', (*log)->terminal);
  close((*log)->fd);
  free(*log);
  *log = NULL;
}
