/* The two clocks of the program: a monotonic one for durations and deadlines, the wall clock for dates. */
#ifndef VD_CLOCK_H
#define VD_CLOCK_H

/* Not collective. Seconds since an arbitrary moment before the program's start; never goes back. */
double vd_clock_seconds(void);

/* Not collective. The wall clock: seconds since 1970-01-01T00:00:00Z. For dates only: it may be set back. */
double vd_clock_date(void);
enum { VD_UTC_BYTES = 32 };
/* Not collective. The wall clock in UTC as ISO 8601, "2026-11-28T04:35:01Z", into text [VD_UTC_BYTES]. */
void vd_clock_utc(char *text);

/* Not collective. Pauses the calling thread for `seconds`, or less where a signal handler runs meanwhile. */
void vd_clock_sleep(double seconds);

#endif
