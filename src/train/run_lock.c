#include "src/train/run_lock.h"

#include "io/atomic_file.h"
#include "src/base/clock.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TRIES = 30, OWNER = 256 };

struct vd_run_lock {
  int fd;
  bool held; /* false: the file system has no locks */
  char directory[1024];
  char notice[1200];
};

/* A lock of the process, not of the descriptor: it passes to no child, and works between the hosts of an NFS. */
static struct flock whole_file(void) {
  return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET};
}

/* Who wrote the file: "HOST PID" without its newline. */
static void read_owner(int fd, char owner[OWNER]) {
  ssize_t n = pread(fd, owner, OWNER - 1, 0);
  owner[n > 0 ? n : 0] = '\0';
  owner[strcspn(owner, "\n")] = '\0';
}

/* The name stands in the file for people. Nothing depends on it, so that a full disk is no reason to fail here. */
static void write_owner(int fd) {
  char host[128] = "", owner[OWNER];
  gethostname(host, sizeof host - 1);
  int n = snprintf(owner, sizeof owner, "host %s, process %ld\n", host, (long)getpid());
  if (ftruncate(fd, 0) != 0 || pwrite(fd, owner, (size_t)n, 0) != n) (void)!ftruncate(fd, 0);
}

/* Takes the lock of an open file; a run that was just killed may take a moment to go. */
static int lock_file(vd_run_lock *l, vd_error *err) {
  for (int i = 0; i < TRIES && !l->held; i++) {
    struct flock lock = whole_file();
    if (i > 0) vd_clock_sleep(0.1);
    l->held = fcntl(l->fd, F_SETLK, &lock) == 0;
    if (!l->held && errno != EAGAIN && errno != EACCES && errno != EINTR) {
      snprintf(l->notice, sizeof l->notice,
               "%s cannot be locked (%s): see to it yourself that no other run uses this folder", l->directory,
               strerror(errno));
      return VD_OK;
    }
  }
  if (l->held) return VD_OK;
  char owner[OWNER];
  read_owner(l->fd, owner);
  return vd_fail(err, VD_FAILED,
                 "another run is at work in run%%directory %s (%s): wait for its end, or choose another run%%directory",
                 l->directory, owner[0] ? owner : "it did not say which");
}

int vd_run_lock_take(vd_run_lock **lock, const char *directory, bool create, vd_error *err) {
  if (!*lock) {
    char path[1100];
    snprintf(path, sizeof path, "%s/.lock", directory);
    int fd = open(path, O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0666);
    if (fd < 0 && !create && (errno == ENOENT || errno == ENOTDIR)) return VD_OK;
    if (fd < 0) return vd_fail(err, VD_FAILED, "cannot open %s: %s", path, strerror(errno));
    vd_run_lock *made = vd_calloc(1, sizeof *made);
    made->fd = fd;
    snprintf(made->directory, sizeof made->directory, "%s", directory);
    if (lock_file(made, err)) {
      vd_run_lock_release(&made);
      return err->status;
    }
    *lock = made;
  }
  if (create) write_owner((*lock)->fd);
  return VD_OK;
}

const char *vd_run_lock_notice(const vd_run_lock *lock) {
  return lock ? lock->notice : "";
}

int vd_run_lock_sweep(const vd_run_lock *lock, vd_error *err) {
  static const char *const ours[] = {"deck.nml", "log.jsonl", "trace.h5"};
  if (!lock || !lock->held) return VD_OK;
  DIR *folder = opendir(lock->directory);
  if (!folder) return vd_fail(err, VD_FAILED, "cannot read the folder %s: %s", lock->directory, strerror(errno));
  for (const struct dirent *e; (e = readdir(folder)) != NULL;) {
    bool left = false;
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) left = left || vd_is_temporary(e->d_name, ours[i]);
    if (left && unlinkat(dirfd(folder), e->d_name, 0) != 0 && errno != ENOENT)
      vd_fail(err, VD_FAILED, "cannot remove %s/%s: %s", lock->directory, e->d_name, strerror(errno));
  }
  closedir(folder);
  return err->status;
}

void vd_run_lock_release(vd_run_lock **lock) {
  if (!*lock) return;
  close((*lock)->fd);
  free(*lock);
  *lock = NULL;
}
