#include "src/base/terminal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

bool vd_terminal_is_interactive(FILE *out) {
  static const char *const launchers[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID"};
  const char *term = getenv("TERM");
  for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++)
    if (getenv(launchers[i])) return false;
  return isatty(fileno(out)) && term && term[0] && strcmp(term, "dumb") != 0;
}

bool vd_terminal_takes_live_line(enum vd_progress_style style) {
  if (style == VD_PROGRESS_AUTO) return vd_terminal_is_interactive(stdout);
  return style == VD_PROGRESS_LINE && isatty(STDOUT_FILENO);
}

int vd_terminal_width(FILE *out) {
  struct winsize size = {.ws_col = 0};
  const char *columns = getenv("COLUMNS");
  int width = 0;
  if (ioctl(fileno(out), TIOCGWINSZ, &size) == 0) width = size.ws_col;
  if (width == 0 && columns) width = (int)strtol(columns, NULL, 10);
  if (width <= 0 || width > 10000) width = 80;
  return width < 2 ? 2 : width;
}
