#include "io/eval_file.h"

#include <stdio.h>
#include <stdlib.h>

struct vd_nll {
  vd_h5 *h5;
  vd_h5_out out;
  hid_t dataset;
};

static int put_source(hid_t file, const vd_eval_source *s, vd_error *err) {
  if (vd_h5_attr_text(file, "split", s->split, err) || vd_h5_attr_text(file, "corpus_id", s->corpus_id, err) ||
      vd_h5_attr_text(file, "checkpoint", s->checkpoint, err) ||
      vd_h5_attr_text(file, "checkpoint_sha256", s->sha256, err) ||
      vd_h5_attr_i64(file, "checkpoint_update", s->update, err))
    return err->status;
  return vd_h5_attr_text(file, "model_settings", s->model_settings, err);
}

int vd_nll_begin(vd_nll **f, vd_h5 *h5, const char *path, int64_t n_token, const vd_eval_source *source,
                 const vd_origin *origin, vd_error *err) {
  vd_nll *n = vd_calloc(1, sizeof *n);
  n->h5 = h5;
  n->dataset = H5I_INVALID_HID;
  vd_dataset d = {.path = "/nll",
                  .dtype = VD_F32,
                  .rank = 1,
                  .shape = {(hsize_t)n_token},
                  .dimension = {"token"},
                  .units = "nats",
                  .long_name = "negative log likelihood of each token of the split given those before it; NaN where it "
                               "was not predicted (the first)"};
  vd_h5_lock(h5);
  if (vd_h5_begin(&n->out, path, "nll", origin, err) == VD_OK) {
    if (put_source(n->out.file, source, err) == VD_OK) vd_h5_dataset(n->out.file, &d, NULL, &n->dataset, err);
    if (err->status) vd_h5_abandon(&n->out);
  }
  vd_h5_unlock(h5);
  if (err->status) {
    free(n);
    return err->status;
  }
  *f = n;
  return VD_OK;
}

int vd_nll_put(vd_nll *f, int64_t first, int64_t n, const float *nll, vd_error *err) {
  if (n == 0) return VD_OK;
  hsize_t offset = (hsize_t)first, count = (hsize_t)n;
  vd_h5_lock(f->h5);
  hid_t file = H5Dget_space(f->dataset), memory = H5Screate_simple(1, &count, NULL);
  if (file < 0 || memory < 0 || H5Sselect_hyperslab(file, H5S_SELECT_SET, &offset, NULL, &count, NULL) < 0 ||
      H5Dwrite(f->dataset, H5T_NATIVE_FLOAT, memory, file, H5P_DEFAULT, nll) < 0)
    vd_h5_fail(err, "cannot write %s", f->out.at.path);
  if (file >= 0) H5Sclose(file);
  if (memory >= 0) H5Sclose(memory);
  vd_h5_unlock(f->h5);
  return err->status;
}

int vd_nll_commit(vd_nll **f, vd_error *err) {
  vd_h5_lock((*f)->h5);
  if (H5Dclose((*f)->dataset) < 0) vd_h5_fail(err, "cannot write %s", (*f)->out.at.path);
  if (err->status)
    vd_h5_abandon(&(*f)->out);
  else
    vd_h5_commit(&(*f)->out, err);
  vd_h5_unlock((*f)->h5);
  free(*f);
  *f = NULL;
  return err->status;
}

void vd_nll_abandon(vd_nll **f) {
  if (!*f) return;
  vd_h5_lock((*f)->h5);
  H5Dclose((*f)->dataset);
  vd_h5_abandon(&(*f)->out);
  vd_h5_unlock((*f)->h5);
  free(*f);
  *f = NULL;
}

struct vd_attention_file {
  vd_h5 *h5;
  vd_h5_out out;
  hid_t mean, weight; /* weight: H5I_INVALID_HID without positions */
  hsize_t n_head, n_distance;
};

/* Coordinates 0 .. n - 1 of a dimension. */
static int put_axis(hid_t file, const char *name, int64_t n, const char *units, const char *long_name, vd_error *err) {
  char path[64];
  int64_t *value = vd_calloc((size_t)n, sizeof *value);
  for (int64_t i = 0; i < n; i++) value[i] = i;
  snprintf(path, sizeof path, "/%s", name);
  vd_dataset d = {.path = path,
                  .dtype = VD_I64,
                  .rank = 1,
                  .shape = {(hsize_t)n},
                  .dimension = {name},
                  .units = units,
                  .long_name = long_name,
                  .deflate = 4};
  vd_h5_dataset(file, &d, value, NULL, err);
  free(value);
  return err->status;
}

static int put_axes(hid_t file, const vd_attention_contents *a, vd_error *err) {
  if (put_axis(file, "layer", a->n_layer, "1", "layer, from the input on", err) ||
      put_axis(file, "head", a->n_head, "1", "attention head of a layer", err) ||
      put_axis(file, "distance", a->n_distance, "tokens",
               "distance from the token that attends, the one before the predicted token, back to the one attended to",
               err))
    return err->status;
  vd_dataset span = {.path = "/span",
                     .dtype = VD_F32,
                     .rank = 2,
                     .shape = {(hsize_t)a->n_layer, (hsize_t)a->n_head},
                     .dimension = {"layer", "head"},
                     .units = "tokens",
                     .long_name = "span of each head; in Transformer-XL the greatest distance that it can see"};
  return vd_h5_dataset(file, &span, a->span, NULL, err);
}

/* Writes a dataset of one value for each position. */
static int put_of_positions(hid_t file, const char *path, enum vd_dtype dtype, int64_t n, const char *units,
                            const char *long_name, const void *value, vd_error *err) {
  vd_dataset d = {.path = path,
                  .dtype = dtype,
                  .rank = 1,
                  .shape = {(hsize_t)n},
                  .dimension = {"position"},
                  .units = units,
                  .long_name = long_name};
  return vd_h5_dataset(file, &d, value, NULL, err);
}

/* The datasets of the positions but for their weights. */
static int put_positions(hid_t file, const vd_attention_contents *a, vd_error *err) {
  int64_t n = a->n_position;
  vd_dataset context = {.path = "/context",
                        .dtype = VD_I32,
                        .rank = 2,
                        .shape = {(hsize_t)n, (hsize_t)a->n_distance},
                        .dimension = {"position", "distance"},
                        .units = "1",
                        .long_name = "id of the token at each distance; -1 where the stream has none",
                        .deflate = 4};
  if (put_of_positions(file, "/position", VD_I64, n, "tokens", "predicted token, counted from the start of the split",
                       a->position, err) ||
      put_of_positions(file, "/token", VD_I32, n, "1", "id of the predicted token", a->token, err) ||
      put_of_positions(file, "/nll", VD_F32, n, "nats", "negative log likelihood of the predicted token", a->nll, err))
    return err->status;
  return vd_h5_dataset(file, &context, a->context, NULL, err);
}

/* Creates the datasets of weights, which are mostly zeros where spans are short. */
static int create_weights(vd_attention_file *f, const vd_attention_contents *a, vd_error *err) {
  hsize_t layers = (hsize_t)a->n_layer;
  vd_dataset mean = {.path = "/distance_weight",
                     .dtype = VD_F64,
                     .rank = 3,
                     .shape = {layers, f->n_head, f->n_distance},
                     .chunk = {1},
                     .dimension = {"layer", "head", "distance"},
                     .units = "1",
                     .long_name = "attention weight at each distance, mean over all predicted tokens",
                     .deflate = 4};
  vd_dataset weight = {.path = "/position_weight",
                       .dtype = VD_F32,
                       .rank = 4,
                       .shape = {(hsize_t)a->n_position, layers, f->n_head, f->n_distance},
                       .chunk = {1, 1},
                       .dimension = {"position", "layer", "head", "distance"},
                       .units = "1",
                       .long_name = "attention weight at each distance in predicting the token at each position",
                       .deflate = 4};
  if (vd_h5_dataset(f->out.file, &mean, NULL, &f->mean, err)) return err->status;
  return a->n_position > 0 ? vd_h5_dataset(f->out.file, &weight, NULL, &f->weight, err) : VD_OK;
}

static int close_weights(vd_attention_file *f, vd_error *err) {
  if ((f->mean >= 0 && H5Dclose(f->mean) < 0) || (f->weight >= 0 && H5Dclose(f->weight) < 0))
    vd_h5_fail(err, "cannot write %s", f->out.at.path);
  f->mean = f->weight = H5I_INVALID_HID;
  return err->status;
}

int vd_attention_file_begin(vd_attention_file **file, vd_h5 *h5, const char *path, const vd_attention_contents *a,
                            const vd_eval_source *source, const vd_origin *origin, vd_error *err) {
  vd_attention_file *f = vd_calloc(1, sizeof *f);
  vd_error none = {0};
  *f = (vd_attention_file){.h5 = h5,
                           .mean = H5I_INVALID_HID,
                           .weight = H5I_INVALID_HID,
                           .n_head = (hsize_t)a->n_head,
                           .n_distance = (hsize_t)a->n_distance};
  vd_h5_lock(h5);
  if (vd_h5_begin(&f->out, path, "attention", origin, err) == VD_OK) {
    if (put_source(f->out.file, source, err) == VD_OK && put_axes(f->out.file, a, err) == VD_OK &&
        (a->n_position == 0 || put_positions(f->out.file, a, err) == VD_OK) &&
        vd_vocabulary_write(f->out.file, a->vocabulary, err) == VD_OK)
      create_weights(f, a, err);
    if (err->status) {
      close_weights(f, &none);
      vd_h5_abandon(&f->out);
    }
  }
  vd_h5_unlock(h5);
  if (err->status)
    free(f);
  else
    *file = f;
  return err->status;
}

/* Writes [n_head][n_distance] values of a dataset at the given first indices. */
static int put_weights(vd_attention_file *f, hid_t dataset, int rank, const hsize_t *first, hid_t type,
                       const void *value, vd_error *err) {
  hsize_t count[4] = {1, 1, 1, 1}, start[4] = {0};
  for (int i = 0; i < rank - 2; i++) start[i] = first[i];
  count[rank - 2] = f->n_head;
  count[rank - 1] = f->n_distance;
  vd_h5_lock(f->h5);
  hid_t file = H5Dget_space(dataset), memory = H5Screate_simple(rank, count, NULL);
  if (file < 0 || memory < 0 || H5Sselect_hyperslab(file, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
      H5Dwrite(dataset, type, memory, file, H5P_DEFAULT, value) < 0)
    vd_h5_fail(err, "cannot write %s", f->out.at.path);
  if (file >= 0) H5Sclose(file);
  if (memory >= 0) H5Sclose(memory);
  vd_h5_unlock(f->h5);
  return err->status;
}

int vd_attention_file_put_mean(vd_attention_file *f, int64_t layer, const double *mean, vd_error *err) {
  return put_weights(f, f->mean, 3, (const hsize_t[]){(hsize_t)layer}, H5T_NATIVE_DOUBLE, mean, err);
}

int vd_attention_file_put_position(vd_attention_file *f, int64_t k, int64_t layer, const float *weight, vd_error *err) {
  return put_weights(f, f->weight, 4, (const hsize_t[]){(hsize_t)k, (hsize_t)layer}, H5T_NATIVE_FLOAT, weight, err);
}

int vd_attention_file_commit(vd_attention_file **f, vd_error *err) {
  vd_h5_lock((*f)->h5);
  if (close_weights(*f, err))
    vd_h5_abandon(&(*f)->out);
  else
    vd_h5_commit(&(*f)->out, err);
  vd_h5_unlock((*f)->h5);
  free(*f);
  *f = NULL;
  return err->status;
}

void vd_attention_file_abandon(vd_attention_file **f) {
  vd_error none = {0};
  if (!*f) return;
  vd_h5_lock((*f)->h5);
  close_weights(*f, &none);
  vd_h5_abandon(&(*f)->out);
  vd_h5_unlock((*f)->h5);
  free(*f);
  *f = NULL;
}
