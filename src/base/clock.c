#include "src/base/clock.h"

#include <math.h>
#include <time.h>

double vd_clock_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double vd_clock_date(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void vd_clock_sleep(double seconds) {
  double whole = floor(seconds);
  struct timespec t = {.tv_sec = (time_t)whole, .tv_nsec = (long)((seconds - whole) * 1e9)};
  nanosleep(&t, NULL);
}

void vd_clock_utc(char *text) {
  time_t now = (time_t)vd_clock_date();
  struct tm utc;
  strftime(text, VD_UTC_BYTES, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
}
