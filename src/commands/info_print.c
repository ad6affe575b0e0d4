#include "src/commands/info_print.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t vd_info_shape(hid_t id, char *text) {
  hsize_t shape[H5S_MAX_RANK];
  hid_t space = H5Dget_space(id);
  int rank = H5Sget_simple_extent_dims(space, shape, NULL), at = 0;
  int64_t n = H5Sget_simple_extent_npoints(space);
  if (rank <= 0) snprintf(text, 96, "scalar");
  for (int i = 0; i < rank && at < 90; i++)
    at += snprintf(text + at, (size_t)(96 - at), "%s%llu%s", i ? ", " : "[", (unsigned long long)shape[i],
                   i + 1 == rank ? "]" : "");
  H5Sclose(space);
  return n;
}

int vd_info_text(hid_t file, const char *attribute, const char *label, vd_error *err) {
  char *value = NULL;
  if (vd_h5_get_text(file, attribute, &value, err) == VD_OK) printf("  %-12s %s\n", label, value);
  free(value);
  return err->status;
}

int vd_info_optional_text(hid_t file, const char *attribute, const char *label, vd_error *err) {
  return H5Aexists(file, attribute) > 0 ? vd_info_text(file, attribute, label, err) : err->status;
}

int vd_info_settings(hid_t file, vd_error *err) {
  char *echo = NULL, *rest = NULL;
  if (vd_h5_get_text(file, "settings", &echo, err)) return err->status;
  printf("  settings\n");
  for (char *line = strtok_r(echo, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) printf("    %s\n", line);
  free(echo);
  return VD_OK;
}
