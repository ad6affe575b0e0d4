/* Files that appear whole or not at all, and opening them with messages that say what is wrong. */
#include "io/h5.h"
#include "src/base/clock.h"
#include "src/base/regular_file.h"
#include "src/base/version.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

hid_t vd_h5_access(void) {
  hid_t list = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_libver_bounds(list, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST);
  if (!getenv("HDF5_USE_FILE_LOCKING")) H5Pset_file_locking(list, 1, 1);
  return list;
}

static int put_origin(hid_t file, const vd_origin *o, vd_error *err) {
  const char *text[][2] = {{"title", o->title},
                           {"hosts", o->hosts},
                           {"devices", o->devices},
                           {"precision", o->precision},
                           {"settings", o->settings}};
  for (size_t i = 0; i < sizeof text / sizeof *text && err->status == VD_OK; i++)
    if (text[i][1] && text[i][1][0]) vd_h5_attr_text(file, text[i][0], text[i][1], err);
  if (err->status == VD_OK && o->ranks > 0) vd_h5_attr_i64(file, "ranks", o->ranks, err);
  if (err->status == VD_OK && o->threads > 0) vd_h5_attr_i64(file, "threads", o->threads, err);
  return err->status;
}

static int stamp(hid_t file, const char *kind, const vd_origin *origin, vd_error *err) {
  char created[VD_UTC_BYTES], conventions[32];
  vd_clock_utc(created);
  snprintf(conventions, sizeof conventions, "Viaduct-%d", VD_FORMAT_VERSION);
  if (vd_h5_attr_text(file, "Conventions", conventions, err) || vd_h5_attr_text(file, "viaduct_kind", kind, err) ||
      vd_h5_attr_i64(file, "format_version", VD_FORMAT_VERSION, err) ||
      vd_h5_attr_text(file, "viaduct_version", vd_version(), err) ||
      vd_h5_attr_text(file, "git_version", vd_git_version(), err) || vd_h5_attr_text(file, "created", created, err))
    return err->status;
  return origin ? put_origin(file, origin, err) : VD_OK;
}

int vd_h5_begin(vd_h5_out *out, const char *path, const char *kind, const vd_origin *origin, vd_error *err) {
  out->file = -1;
  if (vd_atomic_begin(&out->at, path, err)) return err->status;
  hid_t access_list = vd_h5_access(), list = H5Pcreate(H5P_FILE_CREATE);
  /* STRONG: abandoning closes the objects of the file too. vd_h5_finish() reports objects that are open as a bug. */
  H5Pset_fclose_degree(access_list, H5F_CLOSE_STRONG);
  H5Pset_link_creation_order(list, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED);
  out->file = H5Fcreate(out->at.temporary, H5F_ACC_TRUNC, list, access_list);
  if (out->file < 0) vd_h5_fail(err, "cannot create %s", out->at.temporary);
  H5Pclose(list);
  H5Pclose(access_list);
  if (err->status || stamp(out->file, kind, origin, err)) {
    vd_h5_abandon(out);
    return vd_wrap(err, "%s", path);
  }
  return VD_OK;
}

int vd_h5_reserve(hid_t file, const char *path, size_t more, vd_error *err) {
  hid_t access_list = H5Fget_access_plist(file);
  void *handle = NULL;
  hsize_t size = 0;
  struct rlimit limit;
  bool known = H5Fget_filesize(file, &size) >= 0 && H5Fget_vfd_handle(file, access_list, &handle) >= 0 && handle;
  if (!known) vd_h5_fail(err, "cannot tell how large %s is", path);
  H5Pclose(access_list);
  if (!known) return err->status;
  errno = 0;
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < size + more)
    errno = EFBIG;
  else if (fallocate(*(int *)handle, FALLOC_FL_KEEP_SIZE, 0, (off_t)(size + more)) == 0)
    errno = 0;
  if (errno == EFBIG || errno == ENOSPC || errno == EDQUOT)
    vd_fail(err, VD_FAILED, "cannot write %s: %s", path, strerror(errno));
  return err->status;
}

int vd_h5_finish(vd_h5_out *out, vd_error *err) {
  if (out->file < 0) return VD_OK;
  unsigned objects = H5F_OBJ_DATASET | H5F_OBJ_GROUP | H5F_OBJ_DATATYPE | H5F_OBJ_ATTR | H5F_OBJ_LOCAL;
  if (H5Fget_obj_count(out->file, objects) > 0) vd_bug("objects of %s are still open", out->at.path);
  if (vd_h5_reserve(out->file, out->at.path, 64 * 1024, err)) return err->status;
  if (H5Fflush(out->file, H5F_SCOPE_LOCAL) < 0) vd_h5_fail(err, "cannot write %s", out->at.path);
  if (err->status == VD_OK && H5Fclose(out->file) < 0) vd_h5_fail(err, "cannot close %s", out->at.path);
  if (err->status == VD_OK) out->file = -1;
  return err->status;
}

int vd_h5_commit(vd_h5_out *out, vd_error *err) {
  if (vd_h5_finish(out, err) == VD_OK) return vd_atomic_commit(&out->at, err);
  vd_h5_abandon(out);
  return err->status;
}

/* Gives HDF5 memory to write to instead of the disk, through the same descriptor. A file that cannot be flushed (a full
 * disk) could not be closed either, and HDF5 crashes over it when the program ends. */
static void redirect_to_memory(hid_t file) {
  hid_t access_list = H5Fget_access_plist(file);
  void *handle = NULL;
  int memory = memfd_create("viaduct", MFD_CLOEXEC);
  if (memory >= 0 && H5Fget_vfd_handle(file, access_list, &handle) >= 0 && handle) dup2(memory, *(int *)handle);
  if (memory >= 0) close(memory);
  H5Pclose(access_list);
}

void vd_h5_abandon(vd_h5_out *out) {
  if (out->file >= 0) {
    /* A limit on the size of files holds for memory, too: lifted for as long as it takes, as far as it may be. */
    struct rlimit limit, most;
    bool limited = getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < limit.rlim_max;
    most = (struct rlimit){limit.rlim_max, limit.rlim_max};
    limited = limited && setrlimit(RLIMIT_FSIZE, &most) == 0;
    redirect_to_memory(out->file);
    H5Fclose(out->file);
    if (limited) setrlimit(RLIMIT_FSIZE, &limit);
  }
  out->file = -1;
  vd_atomic_abandon(&out->at);
}

int vd_h5_format(hid_t file, int64_t *version, vd_error *err) {
  *version = 1;
  if (H5Aexists(file, "format_version") > 0) vd_h5_get_i64(file, "format_version", version, err);
  return err->status;
}

/* VD_OK when an open HDF5 file is of this kind and of a format that this program reads. */
static int check_kind(hid_t file, const char *path, const char *kind, vd_error *err) {
  vd_error none = {0};
  char *found = NULL;
  int64_t version;
  if (vd_h5_get_text(file, "viaduct_kind", &found, &none) != VD_OK)
    return vd_fail(err, VD_FAILED, "%s is an HDF5 file, but not one of Viaduct's", path);
  if (kind && strcmp(kind, found) != 0)
    vd_fail(err, VD_FAILED, "%s is a Viaduct file of kind '%s'; '%s' is wanted here", path, found, kind);
  free(found);
  if (err->status) return err->status;
  if (vd_h5_format(file, &version, err)) return vd_wrap(err, "%s", path);
  if (version > VD_FORMAT_VERSION)
    vd_fail(err, VD_FAILED,
            "%s was written by a newer viaduct: its format_version is %lld, and this program (version %s) reads up to "
            "%d; use a newer program, or write the file anew with this one",
            path, (long long)version, vd_version(), VD_FORMAT_VERSION);
  if (version < 1) vd_fail(err, VD_FAILED, "%s: format_version is %lld", path, (long long)version);
  return err->status;
}

int vd_h5_open(const char *path, const char *kind, hid_t *file, vd_error *err) {
  *file = -1;
  int fd;
  int64_t size;
  if (vd_open_regular(path, &fd, &size, err)) return err->status;
  close(fd);
  if (size == 0) return vd_fail(err, VD_FAILED, "%s is empty", path);
  if (H5Fis_hdf5(path) <= 0) return vd_fail(err, VD_FAILED, "%s is not an HDF5 file, or its start is damaged", path);
  hid_t access_list = vd_h5_access();
  H5Pset_fclose_degree(access_list, H5F_CLOSE_STRONG);
  hid_t opened = H5Fopen(path, H5F_ACC_RDONLY, access_list);
  if (opened < 0) vd_h5_fail(err, "cannot open %s: it is truncated, damaged, or being written", path);
  H5Pclose(access_list);
  if (opened < 0) return err->status;
  if (check_kind(opened, path, kind, err)) {
    H5Fclose(opened);
    return err->status;
  }
  *file = opened;
  return VD_OK;
}
