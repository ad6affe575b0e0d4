#include "configure.h"

#include "parallel.h"

#include <string.h>

int vd_configure_model(vd_model_config *config, const vd_settings *s, int64_t vocab, vd_error *err) {
  int64_t d_head = s->model.d_head > 0 ? s->model.d_head : s->model.d_model / s->model.n_head;
  if (d_head * s->model.n_head != s->model.d_model)
    return vd_fail(err, VD_USAGE, "model%%d_model = %lld must be model%%n_head = %lld times model%%d_head = %lld",
                   (long long)s->model.d_model, (long long)s->model.n_head, (long long)d_head);
  *config = (vd_model_config){
      .vocab = vocab,
      .n_layer = s->model.n_layer,
      .d_model = s->model.d_model,
      .n_head = s->model.n_head,
      .d_head = d_head,
      .d_inner = s->model.d_inner,
      .dropout = s->model.dropout,
      .emb_dropout = s->model.emb_dropout,
      .attn_span = s->span.attn_span,
      .ramp = s->span.ramp,
      .span_init = s->span.init,
      .span_per_layer = s->span.per_layer,
      .softmax = strcmp(s->span.softmax, "trimmed") == 0 ? VD_TRIMMED : VD_MASKED,
      .aux_loss_scaler = s->span.aux_loss_scaler,
      .init = strcmp(s->model.init, "toolkit") == 0 ? VD_INIT_TOOLKIT : VD_INIT_PUBLISHED,
      .seed = (uint64_t)s->run.seed,
  };
  return VD_OK;
}

void vd_configure_optimizer(vd_optimizer_config *config, const vd_settings *s) {
  *config = (vd_optimizer_config){.lr = s->optimizer.lr,
                                  .eps = s->optimizer.eps,
                                  .clip_step = s->optimizer.clip_step,
                                  .clip_norm = s->optimizer.clip_norm,
                                  .warmup_updates = s->optimizer.warmup_updates};
}

int vd_configure_ops(vd_context *ctx, const vd_settings *s, vd_ops **ops, int *threads, vd_error *err) {
  *threads = vd_threads(ctx->comm, s->device.threads);
  vd_ops_cpu(ops, *threads, err);
  return vd_agree(ctx->comm, err);
}

int vd_configure_corpus(vd_context *ctx, const vd_settings *s, vd_corpus **corpus, vd_error *err) {
  vd_corpus_open(corpus, ctx->h5, s->data.path, err);
  return vd_agree(ctx->comm, err);
}
