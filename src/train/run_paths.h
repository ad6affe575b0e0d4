/* The paths that a command reads and writes, compared before it writes: no output may be an input. */
#ifndef VD_RUN_PATHS_H
#define VD_RUN_PATHS_H

#include "io/corpus.h"
#include "src/base/path_identity.h"
#include "src/deck/settings.h"

/* Not collective. Adds what every command reads that opens a corpus: the deck, data%path and its shards. */
void vd_run_paths_inputs(vd_path_list *list, const vd_settings *s, const vd_corpus *corpus);

/* Not collective. On rank 0. Compares all files that training writes (run%directory's, device%timeline) with all that
 * it reads and with each other. checkpoint: the one to resume from, or "". echo: the text of deck.nml; a deck that is
 * this very file with this very text is no conflict. VD_USAGE naming both paths, or a run%directory whose checkpoints
 * would have too long a path. */
int vd_run_paths_check(const vd_settings *s, const vd_corpus *corpus, const char *checkpoint, const char *echo,
                       vd_error *err);

#endif
