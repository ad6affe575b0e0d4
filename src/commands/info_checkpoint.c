/* `viaduct info` of a checkpoint: where the run stands, tensors, optimiser state, memories, spans. */
#include "src/commands/info_checkpoint.h"
#include "src/commands/info_print.h"
#include "src/deck/settings.h"
#include "src/train/snapshot.h"

#include <hdf5_hl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SPAN_SUFFIX ".adaptive_span._mask.current_val"

/* What a walk over the datasets of a group is for, and what it finds. */
typedef struct walk {
  bool list;                /* a line for each */
  const char *group;        /* its path, for messages */
  const vd_settings *spans; /* not NULL: spans are printed instead */
  int64_t tensors, values;
  double bytes;
  vd_error *err;
} walk;

/* One line of spans: z times the longest span, in tokens. A tensor of one value is the span of all heads of a layer. */
static void print_spans(hid_t id, const char *name, int64_t n, walk *w) {
  double *z = vd_calloc((size_t)n, sizeof *z), sum = 0, most = 0;
  if (H5Dread(id, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, z) < 0) {
    vd_h5_fail(w->err, "cannot read %s/%s", w->group, name);
    free(z);
    return;
  }
  for (int64_t h = 0; h < n; h++) {
    z[h] *= (double)w->spans->span.attn_span;
    sum += z[h];
    most = z[h] > most ? z[h] : most;
  }
  int layer = -1;
  sscanf(name, "layers.%d.", &layer);
  printf("    layer %2d  mean %7.1f  longest %7.1f  %s", layer, sum / (double)n, most, n == 1 ? "layer" : "heads");
  for (int64_t h = 0; h < n; h++) printf(" %.1f", z[h]);
  printf("\n");
  free(z);
}

static herr_t visit(hid_t group, const char *name, const H5L_info_t *info, void *data) {
  walk *w = data;
  (void)info;
  H5O_info_t what;
  if (H5Oget_info_by_name(group, name, &what, H5P_DEFAULT) < 0)
    return vd_h5_fail(w->err, "cannot read what %s/%s is", w->group, name), -1;
  if (what.type != H5O_TYPE_DATASET) return 0;
  hid_t id = H5Dopen2(group, name, H5P_DEFAULT);
  if (id < 0) return vd_h5_fail(w->err, "cannot open %s/%s", w->group, name), -1;
  /* Dimensions are no tensors, and may have a length without values. */
  if (H5DSis_scale(id) <= 0 && vd_h5_check_storage(id, name, w->err) == VD_OK) {
    char shape[96];
    int64_t n = vd_info_shape(id, shape);
    hid_t type = H5Dget_type(id);
    size_t end = strlen(name), suffix = strlen(SPAN_SUFFIX);
    w->tensors++;
    w->values += n;
    w->bytes += (double)n * (double)H5Tget_size(type);
    char *safe = vd_escape(name, false);
    if (w->list) printf("    %-52s %s\n", safe, shape);
    free(safe);
    if (w->spans && end > suffix && strcmp(name + end - suffix, SPAN_SUFFIX) == 0) print_spans(id, name, n, w);
    H5Tclose(type);
  }
  H5Dclose(id);
  if (w->err->status) vd_wrap(w->err, "%s", w->group);
  return w->err->status ? -1 : 0;
}

/* Visits the datasets of group w->group in the order in which they were written. */
static int visit_all(hid_t file, walk *w) {
  hid_t group = H5Gopen2(file, w->group, H5P_DEFAULT);
  if (group < 0) return vd_h5_fail(w->err, "there is no group %s", w->group);
  if (H5Literate(group, H5_INDEX_CRT_ORDER, H5_ITER_INC, NULL, visit, w) < 0)
    vd_h5_fail(w->err, "cannot list the group %s", w->group);
  H5Gclose(group);
  return w->err->status;
}

static int print_place(hid_t file, vd_error *err) {
  vd_snapshot_numbers n;
  if (vd_snapshot_read_numbers(file, &n, err)) return err->status;
  printf("  update       %lld done; next: epoch %lld, block %lld\n", (long long)n.progress.update, (long long)n.epoch,
         (long long)n.block);
  if (n.progress.best_update == 0)
    printf("  valid bpc    none yet\n");
  else
    printf("  valid bpc    %.4f, the lowest so far, after update %lld\n", n.progress.best_bpc,
           (long long)n.progress.best_update);
  if (n.is_scaled)
    printf("  loss scale   %g; %lld updates were skipped\n", n.scaling.scale, (long long)n.scaling.skipped);
  return vd_info_text(file, "corpus_id", "corpus id", err);
}

static herr_t visit_state(hid_t group, const char *name, const H5L_info_t *info, void *data) {
  walk *w = data;
  (void)info;
  char path[256];
  snprintf(path, sizeof path, "/optimizer/%s", name);
  walk state = {.group = path, .err = w->err};
  hid_t file = H5Iget_file_id(group);
  if (visit_all(file, &state) == VD_OK) {
    char *safe = vd_escape(name, false);
    printf("    %-52s %lld tensors, %lld values\n", safe, (long long)state.tensors, (long long)state.values);
    free(safe);
  }
  H5Fclose(file);
  w->tensors++;
  return w->err->status ? -1 : 0;
}

static int print_state(hid_t file, vd_error *err) {
  walk w = {.group = "/optimizer", .err = err};
  printf("  optimiser state\n");
  hid_t group = H5Gopen2(file, w.group, H5P_DEFAULT);
  if (group < 0) return vd_h5_fail(err, "there is no group %s", w.group);
  if (H5Literate(group, H5_INDEX_CRT_ORDER, H5_ITER_INC, NULL, visit_state, &w) < 0)
    vd_h5_fail(err, "cannot list the group %s", w.group);
  H5Gclose(group);
  return err->status;
}

static int print_model(hid_t file, vd_error *err) {
  walk w = {.group = "/model", .list = true, .err = err};
  printf("  parameters\n");
  if (visit_all(file, &w)) return err->status;
  printf("    %lld parameters in %lld tensors, %.2f MiB\n", (long long)w.values, (long long)w.tensors,
         w.bytes / 1048576.0);
  return VD_OK;
}

static int print_spans_of_all(hid_t file, const char *path, vd_error *err) {
  char *echo = NULL;
  vd_settings s;
  if (vd_h5_get_text(file, "settings", &echo, err)) return err->status;
  if (vd_settings_read_text(&s, echo, path, err)) err->status = VD_FAILED; /* no fault of a deck of the user's */
  free(echo);
  if (err->status) return err->status;
  if (s.model.arch == VD_TRANSFORMER_XL) return VD_OK; /* it has none */
  printf("  spans, tokens (of %lld at most)\n", (long long)s.span.attn_span);
  walk w = {.group = "/model", .spans = &s, .err = err};
  return visit_all(file, &w);
}

int vd_info_checkpoint(hid_t file, const char *path, vd_error *err) {
  if (print_place(file, err) || print_model(file, err) || print_spans_of_all(file, path, err) || print_state(file, err))
    return err->status;
  walk memory = {.group = "/memory", .list = true, .err = err};
  printf("  memories [stream, position, feature]\n");
  if (visit_all(file, &memory)) return err->status;
  printf("    %.2f MiB\n", memory.bytes / 1048576.0);
  return vd_info_settings(file, err);
}
