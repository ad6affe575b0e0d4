/* Checks that no output of a command is one of its inputs or another of its outputs.
 *
 * Two paths are the same file when they lead to the same inode (symbolic and hard links, "..", other mounts). A file
 * that does not exist yet is identified by the inode of its folder and its name. */
#ifndef VD_PATH_IDENTITY_H
#define VD_PATH_IDENTITY_H

#include "src/base/error.h"

typedef struct vd_path_list vd_path_list;

enum vd_path_role {
  VD_PATH_INPUT,  /* the command reads it */
  VD_PATH_OUTPUT, /* the command creates, replaces or removes it */
  VD_PATH_RESUMED /* the command reads it, and owns it if its own patterns match it: a checkpoint of the same run */
};

/* Not collective. An empty list; free it with vd_path_list_destroy(). */
vd_path_list *vd_path_list_create(void);
/* Not collective. Frees. NULL is allowed. */
void vd_path_list_destroy(vd_path_list *list);

/* Not collective. Adds a path; "" is ignored. `name` says what it is in messages ("data%path"); both are copied. */
void vd_path_list_add(vd_path_list *list, enum vd_path_role role, const char *name, const char *path);
/* Not collective. Adds all files in `folder`, present or future, whose name is `prefix` (plain text) followed by a
 * match of `pattern` (as of fnmatch()). Two patterns are not compared with each other. */
void vd_path_list_add_pattern(vd_path_list *list, enum vd_path_role role, const char *name, const char *folder,
                              const char *prefix, const char *pattern);

/* Not collective. VD_USAGE naming both when an output is the same file as another entry. Nothing is opened. */
int vd_path_list_check(const vd_path_list *list, vd_error *err);

#endif
