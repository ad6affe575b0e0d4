#include "src/model/sampler.h"

#include "src/base/error.h"
#include "src/base/random.h"

#include <math.h>
#include <stdlib.h>

typedef struct choice {
  double weight;
  int64_t id;
} choice;

struct vd_sampler {
  int64_t vocab, top_k;
  double temperature, top_p;
  uint64_t seed;
  choice *choice; /* [vocab] */
};

vd_sampler *vd_sampler_create(int64_t vocab, double temperature, int64_t top_k, double top_p, uint64_t seed) {
  vd_sampler *s = vd_calloc(1, sizeof *s);
  *s = (vd_sampler){vocab, top_k > 0 && top_k < vocab ? top_k : vocab, temperature, top_p, seed, NULL};
  s->choice = vd_calloc((size_t)vocab, sizeof *s->choice);
  return s;
}

void vd_sampler_destroy(vd_sampler *s) {
  if (!s) return;
  free(s->choice);
  free(s);
}

/* Heaviest first; equal ones by id, so that the choice does not depend on the sort. */
static int compare(const void *a, const void *b) {
  const choice *x = a, *y = b;
  if (x->weight != y->weight) return x->weight > y->weight ? -1 : 1;
  return (x->id > y->id) - (x->id < y->id);
}

/* How many of the choices are drawn from; *total: the sum of their weights. */
static int64_t restrict_choices(const vd_sampler *s, double *total) {
  int64_t k = s->top_k;
  double sum = 0;
  *total = 0;
  for (int64_t v = 0; v < k; v++) *total += s->choice[v].weight;
  if (s->top_p >= 1) return k;
  for (int64_t v = 0; v < k; v++) {
    sum += s->choice[v].weight;
    if (sum >= s->top_p * *total) k = v + 1;
  }
  *total = sum;
  return k;
}

int64_t vd_sampler_draw(vd_sampler *s, const real *logits, uint32_t sample, int64_t position) {
  double t = s->temperature, top = -HUGE_VAL, total;
  for (int64_t v = 0; v < s->vocab; v++) top = fmax(top, (double)logits[v]);
  for (int64_t v = 0; v < s->vocab; v++) {
    double l = (double)logits[v] - top;
    s->choice[v] = (choice){t > 0 ? exp(l / t) : l, v};
  }
  qsort(s->choice, (size_t)s->vocab, sizeof *s->choice, compare);
  if (t <= 0) return s->choice[0].id;
  int64_t k = restrict_choices(s, &total);
  vd_rng rng = {.seed = s->seed, .update = sample, .layer = 0, .site = VD_SITE_SAMPLE};
  double u = vd_uniform(vd_philox(rng, (uint64_t)position).v[0]) * total;
  for (int64_t v = 0; v < k - 1; v++) {
    u -= s->choice[v].weight;
    if (u < 0) return s->choice[v].id;
  }
  return s->choice[k - 1].id;
}
