#include "io/nll.h"

#include <stdlib.h>

struct vd_nll {
  vd_h5 *h5;
  vd_h5_out out;
  hid_t dataset;
};

static int put_source(hid_t file, const vd_nll_source *s, vd_error *err) {
  if (vd_h5_attr_text(file, "split", s->split, err) || vd_h5_attr_text(file, "corpus_id", s->corpus_id, err) ||
      vd_h5_attr_text(file, "checkpoint", s->checkpoint, err) ||
      vd_h5_attr_text(file, "checkpoint_sha256", s->sha256, err) ||
      vd_h5_attr_i64(file, "checkpoint_update", s->update, err))
    return err->status;
  return vd_h5_attr_text(file, "model_settings", s->model_settings, err);
}

int vd_nll_begin(vd_nll **f, vd_h5 *h5, const char *path, int64_t n_token, const vd_nll_source *source,
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
