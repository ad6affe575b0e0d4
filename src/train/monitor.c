#include "src/train/monitor.h"

#include "src/comm/collectives.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Bits and updates: as the comment of vd_monitor_check says. Healthy runs with the longest warmup in use pass these 0.6
 * bits within 100 updates. A run that collapses need not stay at the entropy of single symbols: one of 12 layers
 * ('masked', 'fairseq', a warmup of 1,000) went to and fro between 4.82 and 5.09 for 900 updates, where that was 5.08.
 */
static const double above_entropy = 0.1, below_entropy = 0.5, progress = 0.1, risen = 1.0;
enum { STALLED_UPDATES = 200 };

struct vd_monitor {
  int64_t vocab;
  double *count;      /* [vocab] targets seen on this rank */
  int64_t near_since; /* update at which bpc came near the entropy, or last made progress there; -1: it is not */
  double near_bpc;    /* then */
  double lowest;      /* bpc */
  bool said_stalled, said_risen;
};

vd_monitor *vd_monitor_create(int64_t vocab) {
  vd_monitor *m = vd_calloc(1, sizeof *m);
  m->vocab = vocab;
  m->count = vd_calloc((size_t)vocab, sizeof *m->count);
  m->near_since = -1;
  m->lowest = HUGE_VAL;
  return m;
}

void vd_monitor_destroy(vd_monitor *m) {
  if (!m) return;
  free(m->count);
  free(m);
}

void vd_monitor_count(vd_monitor *m, const int32_t *y, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (y[i] >= 0) m->count[y[i]]++;
}

/* Bits per symbol of all targets that all ranks have seen. */
static double entropy(const vd_monitor *m, MPI_Comm comm) {
  double *all = vd_calloc((size_t)m->vocab, sizeof *all), total = 0, bits = 0;
  MPI_Allreduce(m->count, all, (int)m->vocab, MPI_DOUBLE, MPI_SUM, comm);
  for (int64_t i = 0; i < m->vocab; i++) total += all[i];
  for (int64_t i = 0; i < m->vocab; i++)
    if (all[i] > 0) bits -= all[i] / total * log2(all[i] / total);
  free(all);
  return bits;
}

void vd_monitor_check(vd_monitor *m, MPI_Comm comm, int64_t update, double bpc, char *warning, size_t size) {
  warning[0] = '\0';
  if (!isfinite(bpc)) return; /* every update was skipped; the same on all ranks */
  double h = entropy(m, comm);
  bool near = bpc < h + above_entropy && bpc > h - below_entropy;
  if (!near) {
    m->near_since = -1;
    m->said_stalled = false;
  } else if (m->near_since < 0 || bpc < m->near_bpc - progress) {
    m->near_since = update;
    m->near_bpc = bpc;
  }
  if (bpc < m->lowest) m->lowest = bpc;
  if (bpc <= m->lowest + risen) m->said_risen = false;
  if (m->near_since >= 0 && update - m->near_since >= STALLED_UPDATES && !m->said_stalled) {
    m->said_stalled = true;
    snprintf(warning, size,
             "warning: since update %lld the loss has stayed near %.2f bpc, the entropy of single symbols (now %.2f): "
             "the model has learnt hardly more than how frequent each symbol is, and may have collapsed; a longer "
             "optimizer%%warmup_updates or a lower optimizer%%lr helps",
             (long long)m->near_since, h, bpc);
  } else if (bpc > m->lowest + risen && !m->said_risen) {
    m->said_risen = true;
    snprintf(warning, size, "warning: at update %lld the loss has risen to %.2f bpc, from %.2f at its lowest",
             (long long)update, bpc, m->lowest);
  }
}

const vd_param *vd_monitor_not_finite(const vd_model *m, vd_ops *ops, const real *arena) {
  for (int i = 0; i < vd_model_n_param(m); i++) {
    const vd_param *p = vd_model_param(m, i);
    double norm2;
    ops->square_sums(ops, arena, &p->at, 1, &norm2);
    if (!isfinite(norm2)) return p;
  }
  return NULL;
}
