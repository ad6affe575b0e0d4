/* Datasets that describe themselves: groups on the way, chunks and checksums, dimension scales as netCDF-4 wants them,
 * units and long_name. */
#include "io/h5.h"

#include <hdf5_hl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK_BYTES = 512 * 1024, SCALE_USERS = 4000 };

/* All chunks of the dataset must be stored: a shape alone can claim any size. */
static int check_chunks(hid_t dataset, hid_t list, size_t element, const char *path, vd_error *err) {
  enum { MOST_CHUNK_BYTES = 64 << 20 };
  static const hsize_t MOST_CHUNKS = (hsize_t)1 << 40;
  hsize_t chunk[H5S_MAX_RANK], shape[H5S_MAX_RANK], bytes = element, wanted = 1, stored = 0;
  hid_t space = H5Dget_space(dataset);
  int rank = H5Pget_chunk(list, H5S_MAX_RANK, chunk);
  if (space < 0 || rank < 1 || H5Sget_simple_extent_dims(space, shape, NULL) != rank) {
    vd_h5_fail(err, "cannot read how %s is stored", path);
    rank = 0;
  }
  for (int i = 0; i < rank && err->status == VD_OK; i++) {
    hsize_t along = shape[i] / chunk[i] + (shape[i] % chunk[i] != 0);
    if (chunk[i] > MOST_CHUNK_BYTES / bytes) vd_fail(err, VD_FAILED, "%s has chunks of more than 64 MiB", path);
    bytes *= chunk[i];
    wanted = along != 0 && wanted > MOST_CHUNKS / along ? MOST_CHUNKS : wanted * along;
  }
  if (err->status == VD_OK && H5Dget_num_chunks(dataset, space, &stored) < 0)
    vd_h5_fail(err, "cannot read how %s is stored", path);
  if (err->status == VD_OK && stored != wanted)
    vd_fail(err, VD_FAILED, "%s has a shape of %llu chunks, but the file holds %llu of them", path,
            (unsigned long long)wanted, (unsigned long long)stored);
  if (space >= 0) H5Sclose(space);
  return err->status;
}

/* The same of a dataset that is stored in one piece. */
static int check_piece(hid_t dataset, size_t element, const char *path, vd_error *err) {
  hid_t space = H5Dget_space(dataset);
  hssize_t n = space < 0 ? -1 : H5Sget_simple_extent_npoints(space);
  hsize_t stored = H5Dget_storage_size(dataset);
  if (n < 0)
    vd_h5_fail(err, "cannot read the shape of %s", path);
  else if (stored / element < (hsize_t)n)
    vd_fail(err, VD_FAILED, "%s has a shape of %lld values, but the file holds %llu of them", path, (long long)n,
            (unsigned long long)(stored / element));
  if (space >= 0) H5Sclose(space);
  return err->status;
}

int vd_h5_check_storage(hid_t dataset, const char *path, vd_error *err) {
  hid_t list = H5Dget_create_plist(dataset), type = H5Dget_type(dataset);
  size_t element = type < 0 ? 0 : H5Tget_size(type);
  if (list < 0 || element == 0)
    vd_h5_fail(err, "cannot read how %s is stored", path);
  else if (H5Pget_layout(list) == H5D_VIRTUAL || H5Pget_external_count(list) != 0)
    vd_fail(err, VD_FAILED, "%s keeps its data in another file, which is not read", path);
  else if (H5Pget_layout(list) == H5D_CHUNKED)
    check_chunks(dataset, list, element, path, err);
  else
    check_piece(dataset, element, path, err);
  if (type >= 0) H5Tclose(type);
  if (list >= 0) H5Pclose(list);
  return err->status;
}

int vd_h5_open_dataset(hid_t file, const char *path, hid_t *id, vd_error *err) {
  *id = H5Oopen(file, path, H5P_DEFAULT);
  if (*id >= 0 && H5Iget_type(*id) == H5I_DATASET && vd_h5_check_storage(*id, path, err) == VD_OK) return VD_OK;
  if (err->status == VD_OK) vd_h5_fail(err, "there is no dataset %s", path);
  if (*id >= 0) H5Oclose(*id);
  *id = -1;
  return err->status;
}

/* "float32" and so on, into text [16]. */
static void type_name(hid_t type, char *text) {
  H5T_class_t class = H5Tget_class(type);
  const char *name = class == H5T_FLOAT ? "float" : class == H5T_INTEGER ? "int" : "other";
  bool is_unsigned = class == H5T_INTEGER && H5Tget_sign(type) == H5T_SGN_NONE;
  snprintf(text, 16, "%s%s%u", is_unsigned ? "u" : "", name, (unsigned)(8 * H5Tget_size(type)) % 1000);
}

int vd_h5_check_type(hid_t dataset, const char *path, enum vd_dtype dtype, vd_error *err) {
  char found[16], wanted[16];
  hid_t type = H5Dget_type(dataset);
  if (type < 0) return vd_h5_fail(err, "cannot read the type of %s", path);
  type_name(type, found);
  type_name(vd_h5_type(dtype), wanted);
  H5Tclose(type);
  if (strcmp(found, wanted) != 0) vd_fail(err, VD_FAILED, "%s holds %s, but %s is wanted", path, found, wanted);
  return err->status;
}

int vd_h5_shape(hid_t dataset, const char *path, int *rank, hsize_t shape[4], vd_error *err) {
  hid_t space = H5Dget_space(dataset);
  *rank = space < 0 ? -1 : H5Sget_simple_extent_ndims(space);
  if (*rank < 0 || *rank > 4)
    vd_h5_fail(err, "%s has no shape of at most 4 dimensions", path);
  else if (H5Sget_simple_extent_dims(space, shape, NULL) < 0)
    vd_h5_fail(err, "cannot read the shape of %s", path);
  if (space >= 0) H5Sclose(space);
  return err->status;
}

/* "[64, 8192, 512]", or "a scalar", into text [96]. */
static void shape_text(int rank, const hsize_t *shape, char *text) {
  int at = snprintf(text, 96, rank == 0 ? "a scalar" : "[");
  for (int i = 0; i < rank && at < 90; i++)
    at += snprintf(text + at, (size_t)(96 - at), "%llu%s", (unsigned long long)shape[i], i + 1 < rank ? ", " : "]");
}

static int check_shape(hid_t id, const char *path, int rank, const hsize_t *shape, vd_error *err) {
  int have_rank;
  hsize_t have[4];
  if (vd_h5_shape(id, path, &have_rank, have, err)) return err->status;
  bool same = have_rank == rank;
  for (int i = 0; same && i < rank; i++) same = have[i] == shape[i];
  if (same) return VD_OK;
  char found[96], wanted[96];
  shape_text(have_rank, have, found);
  shape_text(rank, shape, wanted);
  return vd_fail(err, VD_FAILED, "the shape of %s is %s, but %s is wanted", path, found, wanted);
}

int vd_h5_read(hid_t file, const char *path, enum vd_dtype dtype, int rank, const hsize_t *shape, void *out,
               vd_error *err) {
  hid_t id;
  if (vd_h5_open_dataset(file, path, &id, err)) return err->status;
  if (vd_h5_check_type(id, path, dtype, err) == VD_OK && check_shape(id, path, rank, shape, err) == VD_OK &&
      H5Dread(id, vd_h5_type(dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, out) < 0)
    vd_h5_fail(err, "cannot read %s", path);
  H5Dclose(id);
  return err->status;
}

static hid_t file_type(enum vd_dtype dtype) {
  switch (dtype) {
  case VD_U8:
    return H5T_STD_U8LE;
  case VD_U16:
    return H5T_STD_U16LE;
  case VD_I32:
    return H5T_STD_I32LE;
  case VD_I64:
    return H5T_STD_I64LE;
  case VD_F32:
    return H5T_IEEE_F32LE;
  case VD_F64:
    return H5T_IEEE_F64LE;
  }
  vd_bug("no such data type: %d", (int)dtype);
}

/* Opens group `name` in `parent`, creating it with its link order tracked when it is missing. */
static hid_t open_group(hid_t parent, const char *name, vd_error *err) {
  htri_t there = H5Lexists(parent, name, H5P_DEFAULT);
  hid_t group;
  if (there > 0) {
    group = H5Gopen2(parent, name, H5P_DEFAULT);
  } else {
    hid_t list = H5Pcreate(H5P_GROUP_CREATE);
    H5Pset_link_creation_order(list, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED);
    group = H5Gcreate2(parent, name, H5P_DEFAULT, list, H5P_DEFAULT);
    if (group < 0) vd_h5_fail(err, "cannot create the group %s", name);
    H5Pclose(list);
  }
  if (group < 0) vd_h5_fail(err, "cannot open the group %s", name);
  return group;
}

/* The group that is to hold `path`, groups on the way created; *name points at the last part of path. */
static hid_t group_of(hid_t file, const char *path, const char **name, vd_error *err) {
  hid_t group = H5Gopen2(file, path[0] == '/' ? "/" : ".", H5P_DEFAULT);
  if (group < 0) {
    vd_h5_fail(err, "cannot open the root group");
    return group;
  }
  const char *part = path + (path[0] == '/');
  for (const char *slash; (slash = strchr(part, '/')) != NULL; part = slash + 1) {
    char step[256];
    snprintf(step, sizeof step, "%.*s", (int)(slash - part), part);
    hid_t next = open_group(group, step, err);
    H5Gclose(group);
    if (next < 0) return next;
    group = next;
  }
  *name = part;
  return group;
}

/* Halves the chunk, first dimension first so that rows stay whole, until it fits into HDF5's chunk cache. */
static void choose_chunk(const vd_dataset *d, hsize_t chunk[4]) {
  hsize_t bytes = vd_dtype_size(d->dtype);
  for (int i = 0; i < d->rank; i++) {
    bool grows = d->max_shape[i] != 0 && d->max_shape[i] != d->shape[i];
    chunk[i] = d->chunk[i] ? d->chunk[i] : (grows && d->shape[i] < 256) ? 256 : d->shape[i];
    bytes *= chunk[i];
  }
  for (int i = 0; i < d->rank; i++) {
    if (d->chunk[i]) continue;
    while (bytes > CHUNK_BYTES && chunk[i] > 1) {
      bytes = bytes / chunk[i] * ((chunk[i] + 1) / 2);
      chunk[i] = (chunk[i] + 1) / 2;
    }
  }
}

/* The creation list: chunked with a checksum wherever HDF5 can (not for scalars and for what stays empty). */
static hid_t creation_list(const vd_dataset *d) {
  hid_t list = H5Pcreate(H5P_DATASET_CREATE);
  bool can = d->rank > 0;
  for (int i = 0; i < d->rank; i++) can = can && (d->shape[i] > 0 || d->max_shape[i] > 0);
  if (!can) return list;
  hsize_t chunk[4];
  choose_chunk(d, chunk);
  H5Pset_chunk(list, d->rank, chunk);
  if (d->deflate > 0 || d->compressed) {
    if (vd_dtype_size(d->dtype) > 1) H5Pset_shuffle(list);
    H5Pset_deflate(list, d->compressed ? 1 : (unsigned)d->deflate);
  }
  if (!d->compressed) H5Pset_fletcher32(list);
  return list;
}

static hid_t create_dataset(hid_t group, const char *name, const vd_dataset *d, vd_error *err) {
  hsize_t max[4];
  for (int i = 0; i < d->rank; i++) max[i] = d->max_shape[i] ? d->max_shape[i] : d->shape[i];
  hid_t space = d->rank == 0 ? H5Screate(H5S_SCALAR) : H5Screate_simple(d->rank, d->shape, max);
  if (space < 0) vd_h5_fail(err, "cannot describe the shape of %s", d->path);
  hid_t list = creation_list(d);
  hid_t id = err->status ? -1 : H5Dcreate2(group, name, file_type(d->dtype), space, H5P_DEFAULT, list, H5P_DEFAULT);
  if (id < 0) vd_h5_fail(err, "cannot create the dataset %s", d->path);
  H5Pclose(list);
  if (space >= 0) H5Sclose(space);
  return id;
}

/* True when `name` in `group` is a scale of this length that can serve one more dataset. */
static bool scale_fits(hid_t group, const char *name, hsize_t length, hsize_t max) {
  hid_t id = H5Dopen2(group, name, H5P_DEFAULT);
  if (id < 0) return false;
  hid_t space = H5Dget_space(id);
  hsize_t shape = 0, limit = 0;
  bool fits = H5DSis_scale(id) > 0 && H5Sget_simple_extent_ndims(space) == 1;
  if (fits) H5Sget_simple_extent_dims(space, &shape, &limit);
  fits = fits && limit == max && (shape == length || max == H5S_UNLIMITED);
  if (fits && H5Aexists(id, "REFERENCE_LIST") > 0) {
    hid_t users = H5Aopen(id, "REFERENCE_LIST", H5P_DEFAULT);
    hid_t extent = H5Aget_space(users);
    fits = H5Sget_simple_extent_npoints(extent) < SCALE_USERS;
    H5Sclose(extent);
    H5Aclose(users);
  }
  H5Sclose(space);
  H5Dclose(id);
  return fits;
}

/* A dimension without values of its own, marked as netCDF-4 marks one. Nothing is ever written to it. */
static hid_t create_scale(hid_t group, const char *name, hsize_t length, hsize_t max, vd_error *err) {
  hid_t space = H5Screate_simple(1, &length, &max), list = H5Pcreate(H5P_DATASET_CREATE);
  if (max != length) {
    hsize_t chunk = 1024;
    H5Pset_chunk(list, 1, &chunk);
  }
  hid_t id = H5Dcreate2(group, name, H5T_IEEE_F32BE, space, H5P_DEFAULT, list, H5P_DEFAULT);
  char mark[80], long_name[300];
  snprintf(mark, sizeof mark, "This is a netCDF dimension but not a netCDF variable. %9llu",
           (unsigned long long)length);
  snprintf(long_name, sizeof long_name, "dimension %s; it has no values of its own", name);
  if (id < 0 || H5DSset_scale(id, mark) < 0)
    vd_h5_fail(err, "cannot create the dimension %s", name);
  else if (vd_h5_attr_text(id, "units", "1", err) == VD_OK)
    vd_h5_attr_text(id, "long_name", long_name, err);
  H5Pclose(list);
  H5Sclose(space);
  return id;
}

/* The scale for dimension `name` of this length: NAME; NAME_LENGTH where NAME is something else; then NAME_LENGTH_2,
 * ... where all before serve as many datasets as one can. */
static hid_t scale_for(hid_t group, const char *name, hsize_t length, hsize_t max, vd_error *err) {
  char tried[256];
  for (int i = 0; i < 1000; i++) {
    if (i == 0) snprintf(tried, sizeof tried, "%s", name);
    if (i == 1) snprintf(tried, sizeof tried, "%s_%llu", name, (unsigned long long)length);
    if (i > 1) snprintf(tried, sizeof tried, "%s_%llu_%d", name, (unsigned long long)length, i);
    if (H5Lexists(group, tried, H5P_DEFAULT) <= 0) return create_scale(group, tried, length, max, err);
    if (scale_fits(group, tried, length, max)) return H5Dopen2(group, tried, H5P_DEFAULT);
  }
  vd_fail(err, VD_FAILED, "no name is free for the dimension %s of %llu", name, (unsigned long long)length);
  return -1;
}

static int attach_scales(hid_t group, const char *name, hid_t id, const vd_dataset *d, vd_error *err) {
  if (d->rank == 1 && strcmp(name, d->dimension[0]) == 0) {
    if (H5DSset_scale(id, name) < 0) return vd_h5_fail(err, "cannot make %s a dimension scale", d->path);
    return VD_OK;
  }
  for (int i = 0; i < d->rank; i++) {
    if (!d->dimension[i]) vd_bug("dimension %d of %s has no name", i, d->path);
    hsize_t max = d->max_shape[i] ? d->max_shape[i] : d->shape[i];
    hid_t scale = scale_for(group, d->dimension[i], d->shape[i], max, err);
    if (scale >= 0 && err->status == VD_OK && H5DSattach_scale(id, scale, (unsigned)i) < 0)
      vd_h5_fail(err, "cannot attach the dimension %s to %s", d->dimension[i], d->path);
    if (scale >= 0) H5Dclose(scale);
    if (scale < 0 || err->status) return vd_h5_fail(err, "cannot open the dimension %s", d->dimension[i]);
  }
  return VD_OK;
}

static int describe_in(hid_t group, const char *name, hid_t id, const vd_dataset *d, vd_error *err) {
  if (!d->units || !d->long_name) vd_bug("%s has no units or no long_name", d->path);
  if (attach_scales(group, name, id, d, err)) return err->status;
  if (vd_h5_attr_text(id, "units", d->units, err) || vd_h5_attr_text(id, "long_name", d->long_name, err))
    return vd_wrap(err, "%s", d->path);
  return VD_OK;
}

int vd_h5_describe(hid_t file, hid_t id, const vd_dataset *d, vd_error *err) {
  const char *name;
  hid_t group = group_of(file, d->path, &name, err);
  if (group < 0) return err->status;
  describe_in(group, name, id, d, err);
  H5Gclose(group);
  return err->status;
}

int vd_h5_dataset(hid_t file, const vd_dataset *d, const void *data, hid_t *id, vd_error *err) {
  if (d->rank < 0 || d->rank > 4) vd_bug("%s has rank %d", d->path, d->rank);
  if (id) *id = -1;
  const char *name;
  hid_t group = group_of(file, d->path, &name, err);
  if (group < 0) return vd_wrap(err, "%s", d->path);
  hid_t made = create_dataset(group, name, d, err);
  if (made >= 0) describe_in(group, name, made, d, err);
  if (err->status == VD_OK && data && H5Dwrite(made, vd_h5_type(d->dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0)
    vd_h5_fail(err, "cannot write the dataset %s", d->path);
  H5Gclose(group);
  if (made >= 0 && (!id || err->status) && H5Dclose(made) < 0) vd_h5_fail(err, "cannot finish the dataset %s", d->path);
  if (id && err->status == VD_OK) *id = made;
  return err->status;
}
