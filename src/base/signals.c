#include "src/base/signals.h"

#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DUPLICATE_MS = 250 /* a launcher and a scheduler may deliver one request twice within this time */ };
static const struct {
  int number;
  const char *name;
} stopping[] = {{SIGUSR1, "SIGUSR1"}, {SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"}, {SIGHUP, "SIGHUP"}};
enum { N_STOPPING = sizeof stopping / sizeof *stopping };

/* The mutable statics of the program: a handler is given nothing but the signal's number. */
/* noted: the first signal; 0: none. seen_ms: when the first of each kind came, on the monotonic clock; 0: never. */
static volatile sig_atomic_t noted;
static volatile sig_atomic_t seen_ms[N_STOPPING];

static int now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t); /* async-signal-safe */
  return (int)(((long long)t.tv_sec * 1000 + t.tv_nsec / 1000000) & 0x7fffffff) | 1;
}

static void note(int number) {
  int now = now_ms();
  for (int i = 0; i < N_STOPPING; i++) {
    if (stopping[i].number != number) continue;
    if (seen_ms[i] != 0 && ((now - seen_ms[i]) & 0x7fffffff) > DUPLICATE_MS) _exit(128 + number);
    if (seen_ms[i] == 0) seen_ms[i] = now;
  }
  if (noted == 0) noted = number;
}

static void fill(sigset_t *set) {
  sigemptyset(set);
  for (int i = 0; i < N_STOPPING; i++) sigaddset(set, stopping[i].number);
}

void vd_signals_catch(void) {
  struct sigaction action, inherited;
  sigset_t set;
  memset(&action, 0, sizeof action);
  action.sa_handler = note;
  action.sa_flags = SA_RESTART;
  fill(&action.sa_mask);
  for (int i = 0; i < N_STOPPING; i++)
    if (sigaction(stopping[i].number, NULL, &inherited) == 0 && inherited.sa_handler != SIG_IGN)
      sigaction(stopping[i].number, &action, NULL);
  signal(SIGPIPE, SIG_IGN);
  fill(&set);
  sigprocmask(SIG_UNBLOCK, &set, NULL);
}

int vd_signals_noted(void) {
  return (int)noted;
}

int vd_signals_check(vd_error *err) {
  if (noted == 0) return VD_OK;
  const char *name = "";
  for (int i = 0; i < N_STOPPING; i++)
    if (stopping[i].number == noted) name = stopping[i].name;
  return vd_fail(err, 128 + (int)noted, "stopped by %s", name);
}

void vd_signals_default(void) {
  struct sigaction inherited;
  for (int i = 0; i < N_STOPPING; i++)
    if (sigaction(stopping[i].number, NULL, &inherited) == 0 && inherited.sa_handler == note)
      signal(stopping[i].number, SIG_DFL);
  if (noted) raise((int)noted);
}

void vd_signals_block(void) {
  sigset_t set;
  fill(&set);
  sigprocmask(SIG_BLOCK, &set, NULL);
  if (noted) raise((int)noted);
}
