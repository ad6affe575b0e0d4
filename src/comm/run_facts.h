/* What a run computes with: program, ranks, hosts, devices, model size, corpus. Headers on the terminal and attributes
 * of files say these facts in the same words. */
#ifndef VD_RUN_FACTS_H
#define VD_RUN_FACTS_H

#include "io/corpus.h"
#include "src/comm/device.h"

enum { VD_FACT_TEXT = 2048 };

typedef struct vd_run_facts {
  char version[32], git[64];  /* as src/base/version.h gives them */
  int ranks;                  /* of all hosts */
  int n_host;                 /* different hosts */
  int ranks_per_host;         /* of the host with most ranks */
  int threads;                /* OpenMP threads of a rank, the most of all ranks */
  char hosts[VD_FACT_TEXT];   /* "node1, node2": the different names, by rank; the last ones may be "... (64 in all)" */
  char devices[VD_FACT_TEXT]; /* "8 x NVIDIA H100 80GB HBM3": different GPUs by name, or the hosts' CPUs by name */
  char precision[8];          /* of activations: "fp32", "bf16", "fp16"; "fp64" in programs of the tests */
  int64_t parameters;         /* of the model: elements of all tensors */
  int64_t tokens[VD_N_SPLIT]; /* of each split of the corpus */
} vd_run_facts;

/* Collective(ctx->comm). Gathers the facts of all ranks into *facts, the same on all ranks. d: of vd_device_open. model
 * and corpus: NULL for none, whose facts are 0 then. */
void vd_run_facts_gather(vd_context *ctx, const vd_device *d, const vd_model_config *model, const vd_corpus *corpus,
                         vd_run_facts *facts);

/* Not collective. What files say of the run, with its title and resolved deck. Borrows facts, title and settings. */
vd_origin vd_run_facts_origin(const vd_run_facts *facts, const char *title, const char *settings);

#endif
