#include "src/train/configure.h"

#include "src/comm/collectives.h"

int vd_configure_model(vd_model_config *config, const vd_settings *s, int64_t vocab, vd_error *err) {
  int64_t d_head = s->model.d_head > 0 ? s->model.d_head : s->model.d_model / s->model.n_head;
  bool xl = s->model.arch == VD_TRANSFORMER_XL;
  if (!xl && d_head * s->model.n_head != s->model.d_model)
    return vd_fail(err, VD_USAGE, "model%%d_model = %lld must be model%%n_head = %lld times model%%d_head = %lld",
                   (long long)s->model.d_model, (long long)s->model.n_head, (long long)d_head);
  *config = (vd_model_config){
      .arch = s->model.arch,
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
      .softmax = s->span.softmax,
      .aux_loss_scaler = s->span.aux_loss_scaler,
      .init = s->model.init,
      .seed = (uint64_t)s->run.seed,
      .dropatt = s->model.dropatt,
      .mem_len = s->memory.mem_len,
      .clamp_len = s->memory.clamp_len,
      .same_length = s->memory.same_length,
      .initial_memory = s->memory.initial,
      .untie_r = s->model.untie_r,
  };
  return VD_OK;
}

double vd_configure_eps(const vd_settings *s) {
  if (s->optimizer.eps > 0) return s->optimizer.eps;
  return s->optimizer.method == VD_ADAM ? 1e-8 : 1e-10;
}

void vd_configure_optimizer(vd_optimizer_config *config, const vd_settings *s) {
  *config = (vd_optimizer_config){.method = s->optimizer.method,
                                  .schedule = s->optimizer.schedule,
                                  .lr = s->optimizer.lr,
                                  .min_lr = s->optimizer.min_lr,
                                  .eps = vd_configure_eps(s),
                                  .beta1 = s->optimizer.beta1,
                                  .beta2 = s->optimizer.beta2,
                                  .max_updates = s->run.max_updates,
                                  .clip_step = s->optimizer.clip_step,
                                  .clip_norm = s->optimizer.clip_norm,
                                  .warmup_updates = s->optimizer.warmup_updates};
}

bool vd_configure_is_sharded(const vd_settings *s, const vd_device *d) {
  enum vd_shard_optimizer chosen = s->device.shard_optimizer;
  return chosen == VD_SHARD_ON || (chosen == VD_SHARD_AUTO && d->comm == VD_COMM_NCCL);
}

void vd_configure_grad_reducer(vd_grad_reducer_config *config, const vd_settings *s, const vd_device *d) {
  *config = (vd_grad_reducer_config){.comm = d->comm,
                                     .nccl = d->comm == VD_COMM_NCCL ? d->cuda->nccl() : NULL,
                                     .shard = vd_configure_is_sharded(s, d),
                                     .timeout = s->device.timeout,
                                     .timeline = s->device.timeline};
  config->bucket =
      s->device.bucket_bytes > 0 ? (size_t)s->device.bucket_bytes : vd_grad_reducer_default_bucket(config, d->one_node);
}

int vd_configure_corpus(vd_context *ctx, const vd_settings *s, vd_corpus **corpus, vd_error *err) {
  vd_corpus_open(corpus, ctx->h5, s->data.path, err);
  return vd_agree(ctx->comm, err);
}
