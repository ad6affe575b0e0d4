/* Compressed datasets are written chunk by chunk as src/base/plane_deflate makes them: HDF5's own filters write the
 * same format at less than half of the speed. Reading goes through HDF5's filters. */
#include "io/h5.h"
#include "src/base/plane_deflate.h"

#include <stdlib.h>
#include <string.h>

bool vd_h5_can_compress(void) {
  return H5Zfilter_avail(H5Z_FILTER_SHUFFLE) > 0 && H5Zfilter_avail(H5Z_FILTER_DEFLATE) > 0 &&
         H5Tget_order(H5T_NATIVE_FLOAT) == H5T_ORDER_LE;
}

/* An open dataset and how it is cut. A chunk is one piece of memory: it holds one index of each dimension before `cut`,
 * `chunk` indices of that one, and all of those behind it. */
struct target {
  vd_h5 *h5;
  hid_t id;
  const char *path;
  int rank, cut;
  hsize_t shape[4], chunk;
  size_t element, inner; /* bytes of an element; elements of one index of dimension `cut` */
  size_t whole;          /* elements of a chunk */
  uint8_t *buffer;       /* for a padded chunk, its planes and the compressed chunk */
};

/* Under the lock. */
static int open_target(struct target *t, hid_t file, size_t element, vd_error *err) {
  hsize_t chunk[4];
  t->id = H5Dopen2(file, t->path, H5P_DEFAULT);
  if (t->id < 0) return vd_h5_fail(err, "there is no dataset %s", t->path);
  hid_t list = H5Dget_create_plist(t->id);
  if (vd_h5_shape(t->id, t->path, &t->rank, t->shape, err) == VD_OK &&
      (list < 0 || H5Pget_chunk(list, 4, chunk) != t->rank))
    vd_h5_fail(err, "cannot read how %s is stored", t->path);
  if (list >= 0) H5Pclose(list);
  if (err->status) return err->status;
  t->cut = 0;
  t->element = element;
  t->inner = 1;
  while (t->cut < t->rank - 1 && chunk[t->cut] == 1) t->cut++;
  t->chunk = chunk[t->cut];
  for (int i = t->cut + 1; i < t->rank; i++) {
    if (chunk[i] != t->shape[i]) vd_bug("a chunk of %s is not one piece of memory", t->path);
    t->inner *= (size_t)t->shape[i];
  }
  t->whole = (size_t)t->chunk * t->inner;
  t->buffer = vd_calloc(2 * t->whole * element + vd_plane_deflate_bound(t->whole, element), 1);
  return VD_OK;
}

/* Compresses and writes the chunk at `offset`, whose first `count` elements are data; zeros follow. */
static int put_chunk(const struct target *t, const hsize_t *offset, const char *data, size_t count, vd_error *err) {
  size_t bytes = t->whole * t->element, given = count * t->element;
  uint8_t *padded = t->buffer, *planes = padded + bytes, *out = planes + bytes;
  if (given < bytes) {
    memcpy(padded, data, given);
    memset(padded + given, 0, bytes - given);
  }
  size_t size = vd_plane_deflate(given < bytes ? (const void *)padded : data, t->whole, t->element, planes, out);
  vd_h5_lock(t->h5);
  if (H5Dwrite_chunk(t->id, H5P_DEFAULT, 0, offset, size, out) < 0) vd_h5_fail(err, "cannot write %s", t->path);
  vd_h5_unlock(t->h5);
  return err->status;
}

/* All chunks of rows [first, first + n). */
static int put_rows(const struct target *t, hsize_t first, hsize_t n, const char *data, vd_error *err) {
  hsize_t per_row = 1, outer = 1, begin = first, end = first + n;
  for (int i = 1; i < t->cut; i++) per_row *= t->shape[i];
  if (t->cut > 0) {
    outer = n * per_row;
    begin = 0;
    end = t->shape[t->cut];
  }
  for (hsize_t o = 0; o < outer; o++) {
    hsize_t offset[4] = {first + o / per_row}, rest = o % per_row;
    for (int i = t->cut - 1; i > 0; rest /= t->shape[i], i--) offset[i] = rest % t->shape[i];
    for (hsize_t at = begin; at < end; at += t->chunk) {
      size_t count = (size_t)(end - at < t->chunk ? end - at : t->chunk) * t->inner;
      offset[t->cut] = at;
      if (put_chunk(t, offset, data, count, err)) return err->status;
      data += count * t->element;
    }
  }
  return VD_OK;
}

int vd_h5_put_chunks(vd_h5 *h5, hid_t file, const char *path, enum vd_dtype dtype, int64_t first, int64_t n,
                     const void *data, vd_error *err) {
  struct target t = {.h5 = h5, .path = path};
  vd_h5_lock(h5);
  open_target(&t, file, vd_dtype_size(dtype), err);
  vd_h5_unlock(h5);
  if (err->status == VD_OK) {
    hsize_t begin = (hsize_t)first, end = begin + (hsize_t)n;
    bool whole = begin % t.chunk == 0 && (end % t.chunk == 0 || end == t.shape[0]);
    if (end > t.shape[0] || (t.cut == 0 && !whole))
      vd_bug("rows %lld to %lld of %s are not whole chunks", (long long)first, (long long)end, path);
    put_rows(&t, begin, (hsize_t)n, data, err);
  }
  free(t.buffer);
  vd_h5_lock(h5);
  if (t.id >= 0 && H5Dclose(t.id) < 0) vd_h5_fail(err, "cannot finish the dataset %s", path);
  vd_h5_unlock(h5);
  return err->status;
}
