/* libFuzzer target: whatever bytes come, reading them as a deck ends in settings whose echo reads back the same, or in
 * a message. */
#include "src/deck/settings.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  vd_settings *s = vd_calloc(1, sizeof *s), *again = vd_calloc(1, sizeof *again);
  char *text = vd_calloc(size + 1, 1);
  vd_error err = {0};
  memcpy(text, data, size);
  if (vd_settings_read_text(s, text, "fuzz", &err) == VD_OK) {
    char *echo = vd_settings_echo(s), *twice;
    if (vd_settings_read_text(again, echo, "echo", &err) != VD_OK) vd_bug("the echo is refused: %s", err.message);
    twice = vd_settings_echo(again);
    if (strcmp(echo, twice) != 0) vd_bug("the echo of the echo differs");
    free(echo);
    free(twice);
  } else if (err.status != VD_USAGE || !err.message[0]) {
    vd_bug("refused without a message");
  }
  free(text);
  free(s);
  free(again);
  return 0;
}
