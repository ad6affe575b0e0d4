/* Signals that ask a run to stop: SIGTERM and SIGUSR1. The handler only notes the signal; the training loop asks. */
#ifndef VD_SIGNALS_H
#define VD_SIGNALS_H

/* Not collective. From now on SIGTERM and SIGUSR1 are noted instead of ending the process; system calls go on. */
void vd_signals_catch(void);
/* Not collective. The signal noted last on this rank (SIGTERM or SIGUSR1), 0: none. */
int vd_signals_noted(void);

#endif
