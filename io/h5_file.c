/* Files that appear whole or not at all, and opening them with messages that say what is wrong. */
#include "io/h5.h"
#include "src/base/clock.h"
#include "src/base/regular_file.h"
#include "src/base/version.h"

#include <ctype.h>
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

/* Splits path into its folder ("." when it names none) and the name in it. */
static const char *split_path(const char *path, char *folder, size_t size) {
  const char *slash = strrchr(path, '/');
  if (!slash)
    snprintf(folder, size, ".");
  else
    snprintf(folder, size, "%.*s", slash == path ? 1 : (int)(slash - path), path);
  return slash ? slash + 1 : path;
}

int vd_sync_folder(const char *path, vd_error *err) {
  char folder[1024];
  split_path(path, folder, sizeof folder);
  int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  /* Some file systems cannot fsync a folder (EINVAL); there is nothing more to do on them. */
  if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL))
    vd_fail(err, VD_FAILED, "cannot sync the folder %s: %s", folder, strerror(errno));
  if (fd >= 0) close(fd);
  return err->status;
}

bool vd_is_temporary(const char *name, const char *of) {
  const char *mark = strstr(name, ".tmp-");
  if (name[0] != '.' || !mark) return false;
  for (const char *next; (next = strstr(mark + 1, ".tmp-")) != NULL;) mark = next;
  if (of && (strlen(of) != (size_t)(mark - name - 1) || strncmp(name + 1, of, strlen(of)) != 0)) return false;
  const char *digit = mark + 5;
  while (isdigit((unsigned char)*digit)) digit++;
  return digit > mark + 5 && *digit == '\0';
}

int vd_h5_stamp(hid_t file, const char *kind, vd_error *err) {
  char created[VD_UTC_BYTES];
  vd_clock_utc(created);
  if (vd_h5_attr_text(file, "viaduct_kind", kind, err) || vd_h5_attr_text(file, "viaduct_version", vd_version(), err) ||
      vd_h5_attr_text(file, "git_version", vd_git_version(), err) || vd_h5_attr_text(file, "created", created, err))
    return err->status;
  return VD_OK;
}

int vd_h5_begin(vd_h5_out *out, const char *path, const char *kind, vd_error *err) {
  char folder[1024];
  out->file = -1;
  out->temporary[0] = '\0';
  if (strlen(path) >= sizeof out->path) return vd_fail(err, VD_FAILED, "the path is too long: %s", path);
  snprintf(out->path, sizeof out->path, "%s", path);
  const char *name = split_path(path, folder, sizeof folder);
  if (access(folder, W_OK | X_OK) != 0)
    return vd_fail(err, VD_FAILED, "cannot write %s: folder %s: %s", path, folder, strerror(errno));
  snprintf(out->temporary, sizeof out->temporary, "%.*s.%s.tmp-%ld", (int)(name - path), path, name, (long)getpid());
  hid_t access_list = vd_h5_access(), list = H5Pcreate(H5P_FILE_CREATE);
  /* STRONG, so that giving up leaves nothing open; commit takes objects left open for the bug they are. */
  H5Pset_fclose_degree(access_list, H5F_CLOSE_STRONG);
  H5Pset_link_creation_order(list, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED);
  out->file = H5Fcreate(out->temporary, H5F_ACC_TRUNC, list, access_list);
  if (out->file < 0) vd_h5_fail(err, "cannot create %s", out->temporary);
  H5Pclose(list);
  H5Pclose(access_list);
  if (err->status || vd_h5_stamp(out->file, kind, err)) {
    vd_h5_abandon(out);
    return vd_wrap(err, "%s", path);
  }
  return VD_OK;
}

static int sync_file(const char *path, vd_error *err) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || fsync(fd) != 0) vd_fail(err, VD_FAILED, "cannot sync %s: %s", path, strerror(errno));
  if (fd >= 0) close(fd);
  return err->status;
}

int vd_h5_room(hid_t file, const char *path, size_t more, vd_error *err) {
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
  if (H5Fget_obj_count(out->file, objects) > 0) vd_bug("objects of %s are still open", out->path);
  if (vd_h5_room(out->file, out->path, 64 * 1024, err)) return err->status;
  if (H5Fflush(out->file, H5F_SCOPE_LOCAL) < 0) vd_h5_fail(err, "cannot write %s", out->path);
  if (err->status == VD_OK && H5Fclose(out->file) < 0) vd_h5_fail(err, "cannot close %s", out->path);
  if (err->status == VD_OK) out->file = -1;
  return err->status;
}

int vd_h5_commit(vd_h5_out *out, vd_error *err) {
  vd_h5_finish(out, err);
  if (err->status == VD_OK && sync_file(out->temporary, err) == VD_OK && rename(out->temporary, out->path) != 0)
    vd_fail(err, VD_FAILED, "cannot rename %s to %s: %s", out->temporary, out->path, strerror(errno));
  if (err->status) {
    vd_h5_abandon(out);
    return err->status;
  }
  out->temporary[0] = '\0';
  return vd_sync_folder(out->path, err);
}

/* Gives HDF5 memory to write to instead of the disk, through the same descriptor. A file that cannot be flushed (a full
 * disk) could not be closed either, and HDF5 crashes over it when the program ends. */
static void let_it_close(hid_t file) {
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
    let_it_close(out->file);
    H5Fclose(out->file);
    if (limited) setrlimit(RLIMIT_FSIZE, &limit);
  }
  out->file = -1;
  if (out->temporary[0]) unlink(out->temporary);
  out->temporary[0] = '\0';
}

static int check_kind(hid_t file, const char *path, const char *kind, vd_error *err) {
  vd_error none = {0};
  char *found = NULL;
  if (vd_h5_get_text(file, "viaduct_kind", &found, &none) != VD_OK)
    return vd_fail(err, VD_FAILED, "%s is an HDF5 file, but not one of Viaduct's", path);
  if (kind && strcmp(kind, found) != 0)
    vd_fail(err, VD_FAILED, "%s is a Viaduct file of kind '%s'; '%s' is wanted here", path, found, kind);
  free(found);
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
