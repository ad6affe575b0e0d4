#include "src/comm/run_facts.h"

#include "src/base/real.h"
#include "src/base/version.h"
#include "src/comm/collectives.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Where one rank computes. */
struct place {
  char host[64], device[128];
  unsigned char uuid[sizeof((vd_gpu *)0)->uuid]; /* of the GPU */
  bool is_gpu;
  int threads;
};

/* The processor's name as Linux gives it, or "CPU" where it gives none. */
static void name_cpu(char *out, size_t size) {
  char line[512];
  FILE *file = fopen("/proc/cpuinfo", "re");
  snprintf(out, size, "CPU");
  while (file && fgets(line, sizeof line, file)) {
    const char *name = strchr(line, ':');
    if (strncmp(line, "model name", 10) != 0 || !name) continue;
    name += 1 + strspn(name + 1, " \t");
    int n = (int)strcspn(name, "\n");
    if (n > 0) snprintf(out, size, "%.*s", n, name);
    break;
  }
  if (file) fclose(file);
}

static struct place describe(const vd_device *d) {
  struct place own = {.is_gpu = d->is_gpu, .threads = d->threads};
  gethostname(own.host, sizeof own.host - 1);
  if (d->is_gpu) {
    memcpy(own.device, d->gpu.name, sizeof own.device);
    memcpy(own.uuid, d->gpu.uuid, sizeof own.uuid);
  } else {
    name_cpu(own.device, sizeof own.device);
  }
  return own;
}

/* Appends an item to the list in text. The first item that does not fit sets *full and is replaced by the number `n` of
 * all items. */
static void list(char text[VD_FACT_TEXT], const char *item, int n, bool *full) {
  enum { TAIL = 32 };
  size_t used = strlen(text);
  if (*full) return;
  *full = used + 2 + strlen(item) + TAIL > VD_FACT_TEXT;
  if (*full)
    snprintf(text + used, VD_FACT_TEXT - used, ", ... (%d in all)", n);
  else
    snprintf(text + used, VD_FACT_TEXT - used, "%s%s", used > 0 ? ", " : "", item);
}

static bool same_host(const struct place *a, const struct place *b) {
  return strcmp(a->host, b->host) == 0;
}
/* The same GPU, or the CPUs of the same host. */
static bool same_device(const struct place *a, const struct place *b) {
  return a->is_gpu ? memcmp(a->uuid, b->uuid, sizeof a->uuid) == 0 : same_host(a, b);
}
static bool same_kind(const struct place *a, const struct place *b) {
  return strcmp(a->device, b->device) == 0;
}

/* The lowest rank whose place is the same as that of rank r. */
static int first_of(const struct place *all, int r, bool (*same)(const struct place *, const struct place *)) {
  int first = 0;
  while (!same(&all[first], &all[r])) first++;
  return first;
}

static void list_hosts(const struct place *all, int size, vd_run_facts *facts) {
  int *ranks = vd_calloc((size_t)size, sizeof *ranks); /* [size] of a host, at its lowest rank */
  bool full = false;
  for (int r = 0; r < size; r++) {
    int first = first_of(all, r, same_host);
    facts->n_host += first == r;
    if (++ranks[first] > facts->ranks_per_host) facts->ranks_per_host = ranks[first];
  }
  for (int r = 0; r < size; r++)
    if (ranks[r] > 0) list(facts->hosts, all[r].host, facts->n_host, &full);
  free(ranks);
}

static void list_devices(const struct place *all, int size, vd_run_facts *facts) {
  int *devices = vd_calloc((size_t)size, sizeof *devices); /* [size] of one name, at its lowest rank */
  int kinds = 0;
  bool full = false;
  for (int r = 0; r < size; r++)
    if (first_of(all, r, same_device) == r && devices[first_of(all, r, same_kind)]++ == 0) kinds++;
  for (int r = 0; r < size; r++) {
    char item[160];
    if (devices[r] == 0) continue;
    snprintf(item, sizeof item, "%d x %s", devices[r], all[r].device);
    list(facts->devices, devices[r] > 1 ? item : all[r].device, kinds, &full);
  }
  free(devices);
}

static const char *name_precision(const vd_device *d) {
  if (VD_REAL_IS_DOUBLE) return "fp64";
  return !d->is_gpu || d->precision == VD_FP32 ? "fp32" : d->precision == VD_FP16 ? "fp16" : "bf16";
}

void vd_run_facts_gather(vd_context *ctx, const vd_device *d, const vd_model_config *model, const vd_corpus *corpus,
                         vd_run_facts *facts) {
  struct place own = describe(d), *all = vd_calloc((size_t)ctx->size, sizeof *all);
  MPI_Allgather(&own, (int)sizeof own, MPI_BYTE, all, (int)sizeof own, MPI_BYTE, ctx->comm);
  *facts = (vd_run_facts){.ranks = ctx->size, .parameters = model ? vd_model_parameters(model) : 0};
  snprintf(facts->version, sizeof facts->version, "%s", vd_version());
  snprintf(facts->git, sizeof facts->git, "%s", vd_git_version());
  snprintf(facts->precision, sizeof facts->precision, "%s", name_precision(d));
  list_hosts(all, ctx->size, facts);
  list_devices(all, ctx->size, facts);
  for (int r = 0; r < ctx->size; r++)
    if (all[r].threads > facts->threads) facts->threads = all[r].threads;
  for (int i = 0; i < VD_N_SPLIT && corpus; i++) {
    vd_error none = {0}; /* a corpus has all splits, some perhaps of no tokens */
    vd_corpus_length(corpus, vd_split_name(i), &facts->tokens[i], &none);
  }
  free(all);
}

vd_origin vd_run_facts_origin(const vd_run_facts *facts, const char *title, const char *settings) {
  return (vd_origin){.title = title,
                     .hosts = facts->hosts,
                     .devices = facts->devices,
                     .precision = facts->precision,
                     .settings = settings,
                     .ranks = facts->ranks,
                     .threads = facts->threads};
}
