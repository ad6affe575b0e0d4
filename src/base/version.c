/* VD_VERSION and VD_GIT_VERSION come from the Makefile, for this file alone. */
#include "src/base/version.h"

const char *vd_version(void) {
  return VD_VERSION;
}

const char *vd_git_version(void) {
  return VD_GIT_VERSION;
}
