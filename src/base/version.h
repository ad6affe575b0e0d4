/* Which Viaduct this is. The strings live in one object file, so that a new commit recompiles nothing else. */
#ifndef VD_VERSION_H
#define VD_VERSION_H

/* Not collective. The release, such as "0.1.0". Static storage. */
const char *vd_version(void);

/* Not collective. The commit that the program was built from, as `git describe --always --dirty` says it; "unknown"
 * outside a git checkout. Static storage. */
const char *vd_git_version(void);

#endif
