/* Signals that ask the program to stop: SIGUSR1, SIGTERM, SIGINT and SIGHUP. A handler notes the first; the loops of
 * the commands poll it and end in order. The second signal of one kind ends the process at once. */
#ifndef VD_SIGNALS_H
#define VD_SIGNALS_H

#include "src/base/error.h"

/* Not collective. The first call of main: from now on the four signals are noted instead of ending the process, also
 * those that were blocked across vd_signals_block(). A signal whose action the process inherited as ignored (nohup)
 * stays ignored. System calls are restarted. SIGPIPE is ignored: writing to a closed pipe is an error of that write. */
void vd_signals_catch(void);
/* Not collective. The signal noted first in this process; 0: none. */
int vd_signals_noted(void);
/* Not collective. VD_OK while no signal is noted; else 128 + the signal's number with a message that names it: what a
 * command returns that has nothing to save. */
int vd_signals_check(vd_error *err);
/* Not collective. Ends commands without a loop that polls: the four signals end the process again, at once if one is
 * noted already. */
void vd_signals_default(void);
/* Not collective. Blocks the four signals before the process replaces its program by exec; a noted one is raised again
 * and stays pending, so that the new program's vd_signals_catch() notes it. */
void vd_signals_block(void);

#endif
