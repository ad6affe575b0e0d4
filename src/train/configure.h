/* Settings become the configurations of the model, the optimizer, the gradient reducer and the corpus, here only. */
#ifndef VD_CONFIGURE_H
#define VD_CONFIGURE_H

#include "io/corpus.h"
#include "src/comm/context.h"
#include "src/comm/device.h"
#include "src/comm/grad_reducer.h"
#include "src/deck/settings.h"
#include "src/model/model.h"
#include "src/model/optimizer.h"

/* Not collective. Fills *config from &model, &span and &memory for a vocabulary of `vocab` symbols. VD_USAGE where the
 * widths do not fit. */
int vd_configure_model(vd_model_config *config, const vd_settings *s, int64_t vocab, vd_error *err);

/* Not collective. optimizer%eps, or where that is 0 the method's own: 1e-8 of Adam, 1e-10 of Adagrad. */
double vd_configure_eps(const vd_settings *s);

/* Not collective. Fills *config from &optimizer and run%max_updates. */
void vd_configure_optimizer(vd_optimizer_config *config, const vd_settings *s);

/* Not collective. With several ranks: is the optimizer sharded on d, whose comm is chosen (device%shard_optimizer)? */
bool vd_configure_is_sharded(const vd_settings *s, const vd_device *d);

/* Not collective. Fills *config from &device for the gradient all-reduce on d, whose comm is chosen. s must outlive
 * *config. */
void vd_configure_grad_reducer(vd_grad_reducer_config *config, const vd_settings *s, const vd_device *d);

/* Collective(ctx->comm). Opens data%path on every rank. The error is agreed. */
int vd_configure_corpus(vd_context *ctx, const vd_settings *s, vd_corpus **corpus, vd_error *err);

#endif
