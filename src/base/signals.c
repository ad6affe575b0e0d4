#include "src/base/signals.h"

#include <signal.h>
#include <string.h>

/* The one mutable static of the program: a handler is given nothing but the signal's number. */
static volatile sig_atomic_t noted;

static void note(int signal_number) {
  noted = signal_number;
}

void vd_signals_catch(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = note;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGUSR1, &action, NULL);
}

int vd_signals_noted(void) {
  return (int)noted;
}
