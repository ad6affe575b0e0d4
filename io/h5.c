#include "io/h5.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A ticket lock: threads get it in the order in which they asked. The writer of a checkpoint takes it hundreds of times
 * in a row, and a plain mutex would starve the reader. */
struct vd_h5 {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  uint64_t next, served; /* tickets: the holder of the lock has ticket `served` */
  pthread_t holder;
  int depth; /* nested locks of the holder; 0: the lock is free */
};

int vd_h5_create(vd_h5 **h5, vd_error *err) {
  *h5 = NULL;
  if (H5open() < 0 || H5Eset_auto2(H5E_DEFAULT, NULL, NULL) < 0)
    return vd_fail(err, VD_FAILED, "cannot start the HDF5 library");
  /* Nothing outside the file that a user names is read: external links stop being a kind of link. */
  H5Lunregister(H5L_TYPE_EXTERNAL);
  vd_h5 *lock = vd_calloc(1, sizeof *lock);
  pthread_mutex_init(&lock->mutex, NULL);
  pthread_cond_init(&lock->changed, NULL);
  *h5 = lock;
  return VD_OK;
}

void vd_h5_destroy(vd_h5 *h5) {
  if (!h5) return;
  pthread_cond_destroy(&h5->changed);
  pthread_mutex_destroy(&h5->mutex);
  free(h5);
}

void vd_h5_lock(vd_h5 *h5) {
  pthread_mutex_lock(&h5->mutex);
  if (h5->depth == 0 || !pthread_equal(h5->holder, pthread_self())) {
    uint64_t mine = h5->next++;
    while (mine != h5->served) pthread_cond_wait(&h5->changed, &h5->mutex);
    h5->holder = pthread_self();
  }
  h5->depth++;
  pthread_mutex_unlock(&h5->mutex);
}

void vd_h5_unlock(vd_h5 *h5) {
  pthread_mutex_lock(&h5->mutex);
  if (h5->depth == 0 || !pthread_equal(h5->holder, pthread_self()))
    vd_bug("the lock of HDF5 is not held by this thread");
  if (--h5->depth == 0) {
    h5->served++;
    pthread_cond_broadcast(&h5->changed);
  }
  pthread_mutex_unlock(&h5->mutex);
}

/* Keeps the first message of the walk, which starts at the innermost. */
static herr_t innermost(unsigned n, const H5E_error2_t *e, void *text) {
  char *out = text;
  if (n == 0 && e->desc) snprintf(out, 512, "%s", e->desc);
  return 0;
}

int vd_h5_fail(vd_error *err, const char *format, ...) {
  char message[1024], inner[512] = "";
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, innermost, inner);
  if (!inner[0]) return vd_fail(err, VD_FAILED, "%s", message);
  return vd_fail(err, VD_FAILED, "%s (HDF5: %s)", message, inner);
}

hid_t vd_h5_type(enum vd_dtype dtype) {
  switch (dtype) {
  case VD_U8:
    return H5T_NATIVE_UINT8;
  case VD_U16:
    return H5T_NATIVE_UINT16;
  case VD_I32:
    return H5T_NATIVE_INT32;
  case VD_I64:
    return H5T_NATIVE_INT64;
  case VD_F32:
    return H5T_NATIVE_FLOAT;
  case VD_F64:
    return H5T_NATIVE_DOUBLE;
  }
  vd_bug("no such data type: %d", (int)dtype);
}

size_t vd_dtype_size(enum vd_dtype dtype) {
  switch (dtype) {
  case VD_U8:
    return 1;
  case VD_U16:
    return 2;
  case VD_I32:
  case VD_F32:
    return 4;
  case VD_I64:
  case VD_F64:
    return 8;
  }
  vd_bug("no such data type: %d", (int)dtype);
}

int vd_h5_attr_text(hid_t object, const char *name, const char *value, vd_error *err) {
  size_t length = strlen(value);
  hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
  H5Tset_size(type, length ? length : 1);
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  H5Tset_cset(type, H5T_CSET_UTF8);
  hid_t id = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  if (id < 0 || H5Awrite(id, type, value) < 0) vd_h5_fail(err, "cannot write the attribute %s", name);
  if (id >= 0) H5Aclose(id);
  H5Sclose(space);
  H5Tclose(type);
  return err->status;
}

static int attr_scalar(hid_t object, const char *name, hid_t file_type, hid_t memory_type, const void *value,
                       vd_error *err) {
  hid_t space = H5Screate(H5S_SCALAR);
  hid_t id = H5Acreate2(object, name, file_type, space, H5P_DEFAULT, H5P_DEFAULT);
  if (id < 0 || H5Awrite(id, memory_type, value) < 0) vd_h5_fail(err, "cannot write the attribute %s", name);
  if (id >= 0) H5Aclose(id);
  H5Sclose(space);
  return err->status;
}

int vd_h5_attr_i64(hid_t object, const char *name, int64_t value, vd_error *err) {
  return attr_scalar(object, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value, err);
}

int vd_h5_attr_f64(hid_t object, const char *name, double value, vd_error *err) {
  return attr_scalar(object, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &value, err);
}

/* Opens an attribute of one element of the given class; *type is the file's, closed by the caller like the id. */
static hid_t open_attribute(hid_t object, const char *name, H5T_class_t class, hid_t *type, vd_error *err) {
  *type = -1;
  if (H5Aexists(object, name) <= 0) {
    vd_fail(err, VD_FAILED, "there is no attribute %s", name);
    return -1;
  }
  hid_t id = H5Aopen(object, name, H5P_DEFAULT);
  if (id < 0) {
    vd_h5_fail(err, "cannot open the attribute %s", name);
    return -1;
  }
  hid_t space = H5Aget_space(id);
  hssize_t n = H5Sget_simple_extent_npoints(space);
  H5Sclose(space);
  *type = H5Aget_type(id);
  if (n == 1 && H5Tget_class(*type) == class && H5Tis_variable_str(*type) <= 0) return id;
  vd_fail(err, VD_FAILED, "the attribute %s has another type than expected", name);
  H5Tclose(*type);
  H5Aclose(id);
  return -1;
}

int vd_h5_get_text(hid_t object, const char *name, char **value, vd_error *err) {
  hid_t type, id = open_attribute(object, name, H5T_STRING, &type, err);
  *value = NULL;
  if (id < 0) return err->status;
  *value = vd_calloc(H5Tget_size(type) + 1, 1);
  char *text = *value;
  if (H5Aread(id, type, text) < 0) vd_h5_fail(err, "cannot read the attribute %s", name);
  /* What others wrote may end on a terminal. The settings alone have lines. */
  *value = err->status ? NULL : vd_escape(text, strcmp(name, "settings") == 0);
  free(text);
  H5Tclose(type);
  H5Aclose(id);
  return err->status;
}

static int get_scalar(hid_t object, const char *name, H5T_class_t class, hid_t memory_type, void *value,
                      vd_error *err) {
  hid_t type, id = open_attribute(object, name, class, &type, err);
  if (id < 0) return err->status;
  if (H5Aread(id, memory_type, value) < 0) vd_h5_fail(err, "cannot read the attribute %s", name);
  H5Tclose(type);
  H5Aclose(id);
  return err->status;
}

int vd_h5_get_i64(hid_t object, const char *name, int64_t *value, vd_error *err) {
  return get_scalar(object, name, H5T_INTEGER, H5T_NATIVE_INT64, value, err);
}

int vd_h5_get_f64(hid_t object, const char *name, double *value, vd_error *err) {
  return get_scalar(object, name, H5T_FLOAT, H5T_NATIVE_DOUBLE, value, err);
}
