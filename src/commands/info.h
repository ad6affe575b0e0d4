/* What the sources of `viaduct info` share. */
#ifndef VD_INFO_H
#define VD_INFO_H

#include "io/h5.h"

/* Not collective. Under the lock. A text attribute of `file` as "  LABEL    VALUE"; an error when there is none. */
int vd_info_text(hid_t file, const char *attribute, const char *label, vd_error *err);
/* Not collective. Under the lock. The echo of the settings that `file` holds, indented. */
int vd_info_settings(hid_t file, vd_error *err);
/* Not collective. Under the lock. What an open checkpoint holds; `path` names it in messages. */
int vd_info_checkpoint(hid_t file, const char *path, vd_error *err);
/* Not collective. Under the lock. The shape of an open dataset, as "[64, 512]" or "scalar", into text [96]; returns the
 * number of its elements. */
int64_t vd_info_shape(hid_t id, char *text);

#endif
