/* Advisory locks on files: one process at a time works in a run's folder or on a corpus. */
#ifndef VD_FILE_LOCK_H
#define VD_FILE_LOCK_H

enum vd_lock_state {
  VD_LOCK_HELD,
  VD_LOCK_BUSY,       /* another process holds it */
  VD_LOCK_UNSUPPORTED /* the file system has no locks: errno says why */
};

enum { VD_LOCK_OWNER = 256 };

/* Not collective. Locks an open file for this process; tries for three seconds, since a process that was just killed
 * may take a moment to go. The lock ends when the process ends or closes any descriptor of the file. VD_LOCK_BUSY:
 * owner [VD_LOCK_OWNER] gets what the holder wrote with vd_file_lock_sign(). */
enum vd_lock_state vd_file_lock(int fd, char *owner);

/* Not collective. Writes host and process number into a locked file, for people. A full disk is no error. */
void vd_file_lock_sign(int fd);

#endif
