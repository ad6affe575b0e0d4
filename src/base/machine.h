/* What this host can still give to the processes of a run: memory and disk. */
#ifndef VD_MACHINE_H
#define VD_MACHINE_H

enum { VD_LIMIT_TEXT = 64 };

/* Not collective. Bytes of memory that processes of this host may still allocate: MemAvailable of /proc/meminfo, or
 * less where a control group (v1 or v2) of this process has a limit; file caches that the kernel can drop count as
 * free. Writes what limits them into limit: "MemAvailable" or "limit of the control group". root: "" or, for tests, a
 * folder with a proc/ and a sys/ of its own. HUGE_VAL where the host does not say. */
double vd_host_memory(const char *root, char limit[VD_LIMIT_TEXT]);

/* Not collective. Bytes that this process may still map under its limit of address space (ulimit -v); HUGE_VAL: it has
 * no limit. */
double vd_process_memory(void);

/* Not collective. Bytes that a user may still write to the file system of `path`, which may not exist yet: then of the
 * nearest folder above it. HUGE_VAL where the file system does not say. Quotas are not seen. */
double vd_disk_free(const char *path);

/* Not collective. The nearest existing folder above (or at) `path`, into out [size]. */
void vd_existing_folder(const char *path, char *out, int size);

#endif
