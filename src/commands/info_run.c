#include "src/commands/info_run.h"

#include "io/digest.h"
#include "src/deck/settings.h"

#include <dirent.h>
#include <errno.h>
#include <fnmatch.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FOLDER_BYTES = VD_PATH + 32, PATH_BYTES = FOLDER_BYTES + 288 };
static const double VD_MIB = 1048576.0;

static bool is_there(const char *directory, const char *name) {
  char path[PATH_BYTES];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  return access(path, F_OK) == 0;
}

static int print_deck(const char *directory, vd_error *err) {
  char path[PATH_BYTES];
  vd_settings *s = vd_calloc(1, sizeof *s);
  snprintf(path, sizeof path, "%s/deck.nml", directory);
  if (vd_settings_read(s, path, NULL, 0, NULL, err) == VD_OK) {
    printf("  %-12s %s\n", "title", s->run.title);
    printf("  %-12s %s\n", "corpus", s->data.path);
    printf("  %-12s %lld updates of %lld streams, blocks of %lld tokens\n", "deck", (long long)s->run.max_updates,
           (long long)s->data.batch_streams, (long long)s->data.tokens_per_sample);
  }
  free(s);
  return err->status;
}

/* ---- checkpoints ---- */

static int is_checkpoint(const struct dirent *e) {
  return fnmatch("update-[0-9]*.h5", e->d_name, 0) == 0;
}

/* Does the link `link` of the folder name this file? */
static bool names(const char *folder, const char *link, const char *name) {
  char path[PATH_BYTES], target[PATH_BYTES];
  snprintf(path, sizeof path, "%s/%s", folder, link);
  ssize_t n = readlink(path, target, sizeof target - 1);
  if (n < 0) return false;
  target[n] = '\0';
  return strcmp(target, name) == 0;
}

static void print_checkpoint(const char *folder, const char *name, vd_error *err) {
  char path[PATH_BYTES];
  struct stat info;
  vd_error own = {0};
  snprintf(path, sizeof path, "%s/%s", folder, name);
  double bytes = stat(path, &info) == 0 ? (double)info.st_size : 0;
  vd_digest_check(path, NULL, &own);
  printf("    %s  %.1f MiB  %s%s%s\n", name, bytes / VD_MIB, own.status ? "DAMAGED" : "verified",
         names(folder, "last.h5", name) ? ", last.h5" : "", names(folder, "best.h5", name) ? ", best.h5" : "");
  if (own.status) vd_fail(err, own.status, "%s", own.message);
}

static int print_checkpoints(const char *directory, vd_error *err) {
  char folder[FOLDER_BYTES];
  struct dirent **list = NULL;
  snprintf(folder, sizeof folder, "%s/checkpoints", directory);
  int n = scandir(folder, &list, is_checkpoint, alphasort);
  printf("  %-12s %d\n", "checkpoints", n > 0 ? n : 0);
  for (int i = 0; i < n; i++) {
    print_checkpoint(folder, list[i]->d_name, err);
    free(list[i]);
  }
  free(list);
  return err->status;
}

/* ---- log ---- */

static double number_of(const json_t *row, const char *name) {
  const json_t *x = json_object_get(row, name);
  return json_is_number(x) ? json_number_value(x) : 0;
}

/* Keeps the last row of training and the best validation; frees the others. */
static void keep_row(json_t *row, json_t **last, json_t **best) {
  json_t **kept = json_object_get(row, "loss") ? last : best;
  bool wanted =
      json_object_get(row, "loss") || (json_is_number(json_object_get(row, "valid_bpc")) &&
                                       (!*best || number_of(row, "valid_bpc") < number_of(*best, "valid_bpc")));
  if (wanted) {
    json_decref(*kept);
    *kept = row;
  } else {
    json_decref(row);
  }
}

static int print_log(const char *directory, vd_error *err) {
  char path[PATH_BYTES], *line = NULL;
  size_t capacity = 0;
  long long rows = 0;
  json_t *last = NULL, *best = NULL;
  snprintf(path, sizeof path, "%s/log.jsonl", directory);
  FILE *file = fopen(path, "re");
  if (!file) return vd_fail(err, VD_FAILED, "%s: %s", path, strerror(errno));
  for (ssize_t n; (n = getline(&line, &capacity, file)) > 0; rows++)
    keep_row(json_loadb(line, (size_t)n, 0, NULL), &last, &best);
  printf("  %-12s %lld rows\n", "log", rows);
  if (last)
    printf("    last row: update %.0f, bpc %.4f, %.0f tokens/s, mean span %.1f, longest %.0f tokens; %.0f s so far\n",
           number_of(last, "num_updates"), number_of(last, "bpc"), number_of(last, "wps"), number_of(last, "avg_span"),
           number_of(last, "max_span"), number_of(last, "wall"));
  if (best)
    printf("    best validation: bpc %.4f after update %.0f\n", number_of(best, "valid_bpc"),
           number_of(best, "num_updates"));
  json_decref(last);
  json_decref(best);
  free(line);
  fclose(file);
  return VD_OK;
}

static void print_trace(const char *directory, vd_error *err) {
  char path[PATH_BYTES];
  vd_error own = {0};
  snprintf(path, sizeof path, "%s/trace.h5", directory);
  vd_digest_check(path, NULL, &own);
  printf("  %-12s %s\n", "trace", own.status ? "DAMAGED" : "verified");
  if (own.status) vd_fail(err, own.status, "%s", own.message);
}

int vd_info_run(const char *directory, vd_error *err) {
  bool deck = is_there(directory, "deck.nml"), log = is_there(directory, "log.jsonl");
  if (!deck && !log && !is_there(directory, "checkpoints"))
    return vd_fail(err, VD_FAILED, "%s is a folder but not a run's: no deck.nml, log.jsonl or checkpoints/ is in it",
                   directory);
  vd_error first = {0};
  printf("%s\n  %-12s %s\n", directory, "kind", "run");
  if (deck) print_deck(directory, &first);
  print_checkpoints(directory, &first);
  if (log) print_log(directory, &first);
  if (is_there(directory, "trace.h5")) print_trace(directory, &first);
  if (first.status) vd_fail(err, VD_FAILED, "%s", first.message);
  return err->status;
}
