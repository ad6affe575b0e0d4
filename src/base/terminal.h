/* The terminal that a program's output may go to. */
#ifndef VD_TERMINAL_H
#define VD_TERMINAL_H

#include "src/base/choices.h"

#include <stdbool.h>
#include <stdio.h>

/* Not collective. May a line on `out` be rewritten in place? True where it is a terminal, TERM is set and not 'dumb',
 * and no launcher stands between: mpirun and srun give rank 0 a pseudo-terminal whose output they copy, often into a
 * file. A launcher is recognised by its environment (OMPI_COMM_WORLD_SIZE, PMI_SIZE, SLURM_STEP_ID); PMIX_* is no sign
 * of one, since MPI sets it in a process that was started alone. */
bool vd_terminal_is_interactive(FILE *out);

/* Not collective. Is progress on standard output a line that is rewritten, with run%progress = style? Never in a file,
 * whatever the deck says. */
bool vd_terminal_takes_live_line(enum vd_progress_style style);

/* Not collective. Columns of the terminal at this moment; of a terminal that does not say, COLUMNS of the environment,
 * else 80. At least 2. */
int vd_terminal_width(FILE *out);

#endif
