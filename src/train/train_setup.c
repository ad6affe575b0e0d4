#include "io/checkpoint.h"
#include "io/corpus_write.h"
#include "src/base/terminal.h"
#include "src/comm/collectives.h"
#include "src/train/run_folder.h"
#include "src/train/train.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int plan_data(vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  int64_t n, last;
  if (s->data.batch_streams < t->ctx->size)
    return vd_fail(err, VD_USAGE, "data%%batch_streams = %lld are too few for %d ranks: each needs a stream of its own",
                   (long long)s->data.batch_streams, t->ctx->size);
  if (vd_configure_corpus(t->ctx, s, &t->corpus, err)) return err->status;
  if (vd_corpus_length(t->corpus, "train", &n, err)) return err->status;
  t->geometry = (vd_streams){.n_token = n, .n_stream = s->data.batch_streams, .block = s->data.tokens_per_sample};
  if (n - 1 < t->geometry.n_stream)
    return vd_fail(err, VD_USAGE, "the training split of %s has %lld tokens: too few for data%%batch_streams = %lld",
                   s->data.path, (long long)n, (long long)t->geometry.n_stream);
  t->blocks = vd_stream_blocks(&t->geometry);
  vd_stream_share(t->geometry.n_stream, t->ctx->rank, t->ctx->size, &t->stream0, &last);
  t->n_own = last - t->stream0;
  /* A split that is missing or too short shall be known now, not hours later. */
  if (s->valid.interval > 0) {
    if (vd_corpus_length(t->corpus, vd_split_name(s->valid.split), &n, err)) return vd_wrap(err, "valid%%split");
    if (n - 1 < s->valid.streams)
      return vd_fail(err, VD_USAGE, "the split '%s' of %s has %lld tokens: too few for valid%%streams = %lld",
                     vd_split_name(s->valid.split), s->data.path, (long long)n, (long long)s->valid.streams);
  }
  return VD_OK;
}

/* The vocabulary is that of the checkpoint that the run resumes or takes its first parameters from. */
static int plan_start(vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  if (t->resume.path[0])
    return vd_snapshot_adopt_vocabulary(t->ctx, t->resume.path, vd_corpus_id(t->corpus), t->corpus, err);
  if (!s->run.start_from[0]) return VD_OK;
  if (vd_open_checkpoint_find(t->ctx, s, s->run.start_from, &t->start, err) ||
      vd_open_checkpoint_shape(s, &t->start, err))
    return vd_wrap(err, "run%%start_from");
  return vd_snapshot_adopt_vocabulary(t->ctx, t->start.path, t->start.corpus_id, t->corpus, err);
}

int vd_train_plan(vd_train *t, vd_context *ctx, const vd_settings *s, vd_error *err) {
  *t = (vd_train){.ctx = ctx, .settings = s, .progress = {0}};
  t->echo = vd_settings_echo(s);
  if (plan_data(t, err)) return err->status;
  /* Held while the folder is looked through, or what is found there may be gone a moment later. */
  if (ctx->rank == 0 && !ctx->check_only) vd_run_lock_take(&t->lock, s->run.directory, false, err);
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  if (vd_resume_find(ctx, s, vd_corpus_id(t->corpus), &t->resume, err) || plan_start(t, err)) return err->status;
  const char *from = t->resume.path[0] ? t->resume.path : t->start.path;
  if (ctx->rank == 0) vd_run_paths_check(s, t->corpus, from, t->echo, err);
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  return vd_configure_model(&t->config, s, vd_corpus_vocab(t->corpus), err);
}

/* The first file that a run writes, so that a folder that cannot be written is known before any work is done. */
static int write_deck(const char *directory, const char *echo, vd_error *err) {
  char path[VD_PATH + 64];
  snprintf(path, sizeof path, "%s/deck.nml", directory);
  return vd_atomic_write(path, echo, strlen(echo), err);
}

/* A run that began at the same moment in a folder without a lock file may have come and gone since the plan. */
static int lock_folder(vd_train *t, vd_error *err) {
  const char *directory = t->settings->run.directory;
  if (vd_run_lock_take(&t->lock, directory, true, err)) return err->status;
  if (vd_resume_newest(directory) != t->resume.newest)
    return vd_fail(err, VD_FAILED,
                   "another run has just written checkpoints into run%%directory %s: run again to continue", directory);
  return vd_run_lock_sweep(t->lock, err);
}

static int make_run_folder(vd_train *t, vd_error *err) {
  char checkpoints[VD_PATH + 64];
  snprintf(checkpoints, sizeof checkpoints, "%s/checkpoints", t->settings->run.directory);
  if (t->ctx->rank == 0 && vd_make_folder(t->settings->run.directory, err) == VD_OK && lock_folder(t, err) == VD_OK &&
      write_deck(t->settings->run.directory, t->echo, err) == VD_OK)
    vd_make_folder(checkpoints, err);
  return vd_broadcast_error(t->ctx->comm, err);
}

/* Between nodes NCCL would not use it; without shards a rank that failed could not end the sums of the others. */
static int use_symmetric_memory(const vd_train *t, vd_error *err) {
  bool sharded = t->device.comm == VD_COMM_NCCL && vd_configure_is_sharded(t->settings, &t->device);
  if (!sharded || !t->device.one_node || t->ctx->size == 1) return VD_OK;
  return t->device.cuda->nccl()->use_symmetric_memory(t->ops, err);
}

static int make_model(vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  if (vd_device_open(t->ctx, s, &t->config, &t->ops, &t->device, err) ||
      vd_device_choose_comm(t->ctx, s, &t->device, err) || vd_train_check_sizes(t, err) ||
      vd_train_check_memory(t, vd_train_first_window(&t->config), err))
    return err->status;
  vd_run_facts_gather(t->ctx, &t->device, &t->config, t->corpus, &t->facts);
  t->origin = vd_run_facts_origin(&t->facts, s->run.title, t->echo);
  vd_optimizer_config optimizer;
  vd_configure_optimizer(&optimizer, s);
  if (t->device.precision == VD_FP16) {
    optimizer.loss_scale = s->device.loss_scale;
    optimizer.loss_scale_window = s->device.loss_scale_window;
  }
  if (use_symmetric_memory(t, err) == VD_OK &&
      vd_model_create(&t->model, &t->config, t->ops, t->stream0, t->n_own, s->data.micro_streams,
                      s->data.tokens_per_sample, true, err) == VD_OK)
    vd_optimizer_create(&t->optimizer, &optimizer, t->model, t->ops, err);
  if (vd_agree(t->ctx->comm, err)) return err->status;
  t->pipeline = vd_update_pipeline_create(t->model, t->optimizer, t->ops);
  vd_grad_reducer_config reducer;
  vd_configure_grad_reducer(&reducer, s, &t->device);
  const vd_grad_reducer_arenas arenas = vd_grad_reducer_arenas_of(t->model);
  if (vd_grad_reducer_create(&t->reducer, t->ctx->comm, &reducer, t->ops, &arenas, err) == VD_OK)
    vd_grad_reducer_shard_optimizer(t->reducer, t->model, t->optimizer);
  return err->status;
}

/* A run that died between a checkpoint and its links left stale ones: they are made anew. */
static void mend_links(const vd_train *t, vd_error *err) {
  const char *directory = t->settings->run.directory;
  char path[VD_PATH + 64];
  vd_checkpoint_path(directory, t->progress.update, path, sizeof path);
  if (access(path, F_OK) == 0) vd_checkpoint_link(directory, "last", t->progress.update, err);
  vd_checkpoint_path(directory, t->progress.best_update, path, sizeof path);
  if (t->progress.best_update > 0 && access(path, F_OK) == 0)
    vd_checkpoint_link(directory, "best", t->progress.best_update, err);
}

static int restore(vd_train *t, vd_error *err) {
  if (!t->resume.path[0] && t->start.path[0])
    return vd_snapshot_read_parameters(t->ctx, t->ops, t->model, t->start.path, err);
  if (!t->resume.path[0]) return VD_OK;
  const vd_snapshot snapshot = vd_train_snapshot(t);
  if (vd_snapshot_read(&snapshot, t->resume.path, &t->progress, err)) return err->status;
  t->saved_update = t->progress.update;
  t->seconds_before = t->progress.log.seconds;
  snprintf(t->last_good, sizeof t->last_good, "%s", t->resume.path);
  if (t->ctx->rank == 0) mend_links(t, err);
  return vd_broadcast_error(t->ctx->comm, err);
}

static void log_start(vd_train *t) {
  vd_train_print_header(t);
  char *line = t->resume.notice, *rest = NULL;
  for (line = strtok_r(line, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) vd_log_message(t->log, "%s", line);
  const char *notices[] = {vd_run_lock_notice(t->lock), vd_trace_notice(t->trace), t->device.notice,
                           t->device.comm_notice};
  for (int i = 0; i < 4; i++)
    if (notices[i][0]) vd_log_message(t->log, "%s", notices[i]);
}

static int open_logs(vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  char path[VD_PATH + 64];
  snprintf(path, sizeof path, "%s/trace.h5", s->run.directory);
  if (t->ctx->rank == 0 &&
      vd_log_open(&t->log, s->run.directory, t->progress.update, s->run.max_updates, stdout,
                  vd_terminal_takes_live_line(s->run.progress), err) == VD_OK &&
      vd_trace_open(&t->trace, t->ctx->h5, path, (int)t->config.n_layer, (int)t->config.n_head, t->progress.update,
                    &t->origin, err) == VD_OK)
    log_start(t);
  return vd_broadcast_error(t->ctx->comm, err);
}

int vd_train_open(vd_train *t, vd_error *err) {
  if (make_run_folder(t, err)) return err->status;
  if (make_model(t, err)) return err->status;
  if (restore(t, err)) return err->status;
  if (open_logs(t, err)) return err->status;
  if (t->ctx->rank == 0) vd_task_queue_create(&t->writer, VD_TASK_QUEUE_BYTES, err);
  t->monitor = vd_monitor_create(t->config.vocab);
  t->span = vd_calloc((size_t)(t->config.n_layer * t->config.n_head), sizeof *t->span);
  vd_reader_start(&t->reader, t->corpus, "train", &t->geometry, t->stream0, t->stream0 + t->n_own, t->progress.update,
                  -1, (int)t->settings->data.read_ahead, err);
  return vd_agree(t->ctx->comm, err);
}

void vd_train_close(vd_train *t, vd_error *err) {
  vd_task_queue_destroy(t->writer); /* first: it may still be writing what the loop left to it */
  vd_reader_stop(t->reader);
  if (t->trace) vd_trace_close(&t->trace, err);
  if (t->log) vd_log_close(&t->log);
  vd_monitor_destroy(t->monitor);
  vd_evaluator_destroy(t->evaluator);
  vd_grad_reducer_destroy(t->reducer);
  vd_update_pipeline_destroy(t->pipeline);
  vd_optimizer_destroy(t->optimizer);
  if (t->model) vd_model_destroy(t->model);
  if (t->ops) t->ops->destroy(t->ops);
  if (t->corpus) vd_corpus_close(t->corpus);
  free(t->span);
  free(t->echo);
  vd_run_lock_release(&t->lock); /* last: until here files of the run may be written */
}
