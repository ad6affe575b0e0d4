#include "src/train/configure.h"

#include "src/comm/collectives.h"

#include <string.h>

int vd_configure_model(vd_model_config *config, const vd_settings *s, int64_t vocab, vd_error *err) {
  int64_t d_head = s->model.d_head > 0 ? s->model.d_head : s->model.d_model / s->model.n_head;
  bool xl = strcmp(s->model.arch, "transformer_xl") == 0;
  if (!xl && d_head * s->model.n_head != s->model.d_model)
    return vd_fail(err, VD_USAGE, "model%%d_model = %lld must be model%%n_head = %lld times model%%d_head = %lld",
                   (long long)s->model.d_model, (long long)s->model.n_head, (long long)d_head);
  *config = (vd_model_config){
      .arch = xl ? VD_TRANSFORMER_XL : VD_ADAPTIVE_SPAN,
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
      .init = strcmp(s->model.init, "toolkit") == 0 ? VD_INIT_FAIRSEQ : VD_INIT_PUBLISHED,
      .seed = (uint64_t)s->run.seed,
      .dropatt = s->model.dropatt,
      .mem_len = s->memory.mem_len,
      .clamp_len = s->memory.clamp_len,
      .same_length = s->memory.same_length,
      .untie_r = s->model.untie_r,
  };
  return VD_OK;
}

void vd_configure_optimizer(vd_optimizer_config *config, const vd_settings *s) {
  bool adam = strcmp(s->optimizer.method, "adam") == 0;
  *config = (vd_optimizer_config){.method = adam ? VD_ADAM : VD_ADAGRAD,
                                  .schedule = strcmp(s->optimizer.schedule, "cosine") == 0 ? VD_COSINE : VD_CONSTANT,
                                  .lr = s->optimizer.lr,
                                  .min_lr = s->optimizer.min_lr,
                                  .eps = s->optimizer.eps > 0 ? s->optimizer.eps
                                         : adam               ? 1e-8
                                                              : 1e-10,
                                  .beta1 = s->optimizer.beta1,
                                  .beta2 = s->optimizer.beta2,
                                  .max_updates = s->run.max_updates,
                                  .clip_step = s->optimizer.clip_step,
                                  .clip_norm = s->optimizer.clip_norm,
                                  .warmup_updates = s->optimizer.warmup_updates};
}

void vd_configure_grad_reducer(vd_grad_reducer_config *config, const vd_settings *s, const vd_device *d) {
  *config = (vd_grad_reducer_config){.comm = d->comm,
                                     .nccl = d->comm == VD_COMM_NCCL ? d->cuda->nccl() : NULL,
                                     .bucket = (size_t)s->device.bucket_bytes,
                                     .timeout = s->device.timeout,
                                     .timeline = s->device.timeline};
}

int vd_configure_corpus(vd_context *ctx, const vd_settings *s, vd_corpus **corpus, vd_error *err) {
  vd_corpus_open(corpus, ctx->h5, s->data.path, err);
  return vd_agree(ctx->comm, err);
}
