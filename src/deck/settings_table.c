/* THE table: one row for each variable of a deck. Reading, checking, `viaduct input`, doc/INPUT.md and the echo in
 * every output file come from these rows; a new variable is one member in settings.h and one row here. */
#include "src/deck/settings_table.h"

#include <math.h>
#include <stddef.h>

#define NONE HUGE_VAL
/* NOLINTNEXTLINE(bugprone-macro-parentheses): the name of a member cannot stand in parentheses */
#define AT(g, n) offsetof(vd_settings, g.n), sizeof(((vd_settings *)0)->g.n)

/* clang-format off: one kind of row a line */
#define INTEGER(g, n, preset, low, high, unit, flag, doc)                                                              \
  { #g, #n, VD_INTEGER, AT(g, n), preset, low, high, false, false, NULL, unit, flag, doc }
#define REAL(g, n, preset, low, low_open, high, high_open, unit, flag, doc)                                            \
  { #g, #n, VD_REAL, AT(g, n), preset, low, high, low_open, high_open, NULL, unit, flag, doc }
#define LOGICAL(g, n, preset, flag, doc)                                                                               \
  { #g, #n, VD_LOGICAL, AT(g, n), preset, -NONE, NONE, false, false, NULL, "", flag, doc }
#define STRING(g, n, preset, flag, doc)                                                                                \
  { #g, #n, VD_STRING, AT(g, n), preset, -NONE, NONE, false, false, NULL, "", flag, doc }
#define CHOICE(g, n, preset, choices, flag, doc)                                                                       \
  { #g, #n, VD_CHOICE, AT(g, n), preset, -NONE, NONE, false, false, choices, "", flag, doc }
/* clang-format on */

const vd_group_row vd_groups[] = {
    {"run", "The run as a whole: its folder, its length, and whether it resumes."},
    {"data", "The corpus, and how it is cut into streams and blocks."},
    {"model", "The architecture and its sizes."},
    {"span", "How far back a head looks: the adaptive span of arXiv 1905.07799."},
    {"memory", "The memory of Transformer-XL (arXiv 1901.02860): hidden states of the tokens before a block. `viaduct "
               "eval` may set other values than the model was trained with."},
    {"optimizer", "The optimizer, gradient clipping and the learning-rate schedule."},
    {"valid", "Validation while training."},
    {"checkpoint", "Checkpoints while training, in checkpoints/ of run%directory."},
    {"trace", "The trace of a training run, trace.h5 in run%directory."},
    {"device", "The backend, its precision, and how gradients are all-reduced over ranks."},
    {"eval", "Used by `viaduct eval`: bits per symbol (bpc) of a split."},
    {"generate", "Used by `viaduct generate`: text from a trained model."},
    {"compress", "Used by `viaduct compress` and `viaduct decompress`: files packed with the predictions of a model."},
    {"prepare", "Used by `viaduct prepare`: raw bytes or texts become a corpus, written to data%path."},
};
const size_t vd_n_groups = sizeof vd_groups / sizeof *vd_groups;

const vd_variable vd_variables[] = {
    STRING(run, title, "''", "",
           "Free text that goes into every file the run writes, and into the titles of pictures."),
    STRING(run, directory, "'runs/default'", "--save-dir",
           "Folder for everything that a run writes (log.jsonl, trace.h5, checkpoints/); made when missing. Relative "
           "to the working directory."),
    INTEGER(run, seed, "1", 0, 9007199254740992.0, "", "--seed",
            "Seed of the initial parameters, of dropout and of sampling. Random numbers depend on the seed and on "
            "global positions only, never on the number of ranks."),
    INTEGER(
        run, max_updates, "0", 0, 1e15, "updates", "--max-update",
        "Training ends after this many updates. Updates before a resumption count. `viaduct train` needs at least 1."),
    STRING(run, resume, "'auto'", "--restore-file",
           "'auto': resume from the newest whole checkpoint in run%directory, or start a new run where there is none; "
           "'never': start a new run; anything else: the path of the checkpoint to resume from."),
    STRING(
        run, start_from, "''", "--finetune-from-model",
        "A checkpoint whose parameters alone, spans included, begin a new run: update 0, a fresh optimiser, other data "
        "allowed, with the model's vocabulary. Where the run has checkpoints of its own, as after a requeue, it "
        "resumes from those. '': initial parameters are drawn."),
    INTEGER(run, log_interval, "25", 1, 1e15, "updates", "--log-interval",
            "Updates between two lines of log.jsonl and of the progress report."),
    CHOICE(run, progress, "'auto'", "auto line plain", "",
           "How train, compress and decompress report progress on standard output. 'line': one line that is rewritten "
           "in place, where "
           "standard output is a terminal. 'plain': whole lines, one every run%log_interval updates or 30 seconds, "
           "whichever is later. 'auto': 'line' on a terminal that can do it, without mpirun or srun between; "
           "else 'plain'."),

    STRING(data, path, "''", "",
           "The corpus, NAME.h5: written by `viaduct prepare`, read by train, eval and generate."),
    INTEGER(data, tokens_per_sample, "512", 1, 1048576, "tokens", "--tokens-per-sample",
            "Length of a block: tokens of each stream that one update predicts."),
    INTEGER(data, batch_streams, "64", 1, 1048576, "streams", "--batch-size times the number of GPUs",
            "Streams read side by side, each a contiguous part of the split. The number is global and shared out over "
            "the ranks, so that a run gives the same curve on any number of ranks."),
    INTEGER(data, micro_streams, "0", 0, 1048576, "streams", "--update-freq (the other way round)",
            "Streams of a rank that are computed at once; gradients of the parts are added up. Less memory, the same "
            "result. 0: all streams of the rank."),
    INTEGER(data, read_ahead, "4", 1, 1024, "blocks", "--num-workers",
            "Blocks that a rank reads ahead of their use, on a thread of its own."),

    CHOICE(model, arch, "'adaptive_span'", "adaptive_span transformer_xl", "--arch",
           "Architecture: 'adaptive_span', the adaptive-span transformer, whose variables are in &span, or "
           "'transformer_xl', whose variables are in &memory. A variable of the one is refused in training the other."),
    INTEGER(model, n_layer, "12", 1, 256, "layers", "--n-layer", "Transformer layers."),
    INTEGER(model, d_model, "512", 1, 65536, "", "--d-model",
            "Width of the hidden states. A multiple of n_head unless d_head is given."),
    INTEGER(model, n_head, "8", 1, 1024, "heads", "--n-head", "Attention heads of a layer."),
    INTEGER(model, d_head, "0", 0, 65536, "", "",
            "Width of a head. 0: d_model / n_head, which it must be in 'adaptive_span'."),
    INTEGER(model, d_inner, "2048", 1, 1048576, "", "--d-inner", "Hidden units of the feed-forward part of a layer."),
    REAL(model, dropout, "0.0", 0, false, 0.99, false, "", "--dropout",
         "Probability that a hidden unit of the feed-forward part, or an attention weight, is set to zero in training. "
         "In 'transformer_xl': that an element of the embedding, of the sinusoidal position encodings, of a layer's "
         "two branches, of their hidden units or of the last layer's output is set to zero."),
    REAL(model, emb_dropout, "0.0", 0, false, 0.99, false, "", "--emb-dropout",
         "Dropout probability of the elements of the embedding, in 'adaptive_span'."),
    REAL(model, dropatt, "0.0", 0, false, 0.99, false, "", "--dropatt",
         "Dropout probability of attention weights, in 'transformer_xl'."),
    LOGICAL(model, untie_r, ".true.", "",
            "In 'transformer_xl', .true.: each layer has its own biases of content and position; .false.: all layers "
            "share one pair."),
    CHOICE(model, init, "'published'", "published fairseq", "",
           "Initial parameters. 'published': embedding N(0,1), linear weights and biases uniform in +-1/sqrt(fan in). "
           "'fairseq': as fairseq's adaptive_span example does, embedding with standard deviation 1/sqrt(d_model), "
           "attention Xavier normal, feed-forward Xavier uniform, the rest as 'published'. In 'transformer_xl' both "
           "mean N(0, 0.02), N(1, 0.02) for the weights of layer norms, and zero biases."),

    INTEGER(span, attn_span, "8192", 1, 16777216, "tokens", "--attn-span",
            "The longest span that a head can learn. A token attends to at most this many tokens before it."),
    INTEGER(span, ramp, "32", 1, 16777216, "tokens", "--adapt-span-ramp",
            "Length of the soft edge of the mask, over which attention falls from full to none."),
    REAL(span, init, "0.0", 0, false, 1, false, "fraction of attn_span", "--adapt-span-init",
         "Span of every head at the start of training."),
    LOGICAL(span, per_layer, ".false.", "--adapt-span-layer",
            ".true.: the heads of a layer share one span; .false.: each head has its own."),
    REAL(span, aux_loss_scaler, "0.0", 0, false, NONE, true, "nats per token of span", "--aux-loss-scaler",
         "Weight of the penalty on spans: the loss grows by this times the sum over layers of the layer's mean span in "
         "tokens."),
    CHOICE(span, softmax, "'masked'", "masked trimmed", "",
           "'masked': attention is normalised after the mask, as in the paper; a head costs what its own span costs. "
           "'trimmed': normalised over the layer's window before the mask, as in fairseq's adaptive_span example."),

    INTEGER(memory, mem_len, "512", 0, 16777216, "tokens", "--mem-len",
            "Tokens before the block whose hidden states each layer keeps."),
    INTEGER(memory, clamp_len, "0", -1, 16777216, "tokens", "--clamp-len",
            "Largest distance that position encodings distinguish: greater distances are clamped to it. 0 or -1: no "
            "clamp."),
    LOGICAL(memory, same_length, ".false.", "--same-length",
            ".true.: every token sees mem_len tokens at most, itself included; .false.: a block's last token sees more "
            "than its first."),
    CHOICE(
        memory, initial, "'empty'", "empty zeros", "",
        "The memory at the start of an epoch or of an evaluation. 'empty': no hidden states, as in the published code. "
        "'zeros': mem_len hidden states of zeros, to which tokens attend, as in fairseq's truncated_bptt example."),

    CHOICE(optimizer, method, "'adagrad'", "adagrad adam", "--optimizer",
           "'adagrad', with the clipping of clip_step (fairseq's adagrad_with_grad_clip), or 'adam', with bias "
           "correction."),
    REAL(optimizer, lr, "0.07", 0, true, NONE, true, "", "--lr", "Learning rate after the warmup."),
    REAL(optimizer, min_lr, "0.0", 0, false, NONE, true, "", "--min-lr",
         "Learning rate at the end of schedule = 'cosine'."),
    REAL(optimizer, eps, "0.0", 0, false, NONE, true, "", "--adam-eps",
         "Added to the square root of Adagrad's accumulator or Adam's second moment, against division by zero. 0: "
         "1e-10 for 'adagrad', 1e-8 for 'adam'."),
    REAL(optimizer, beta1, "0.9", 0, false, 1, true, "", "--adam-betas", "Decay of Adam's mean gradient."),
    REAL(optimizer, beta2, "0.999", 0, false, 1, true, "", "--adam-betas", "Decay of Adam's mean squared gradient."),
    CHOICE(optimizer, schedule, "'constant'", "constant cosine", "--lr-scheduler",
           "Learning rate after the warmup: 'constant' (fairseq's fixed), or 'cosine': half a cosine from lr down to "
           "min_lr at run%max_updates."),
    INTEGER(optimizer, warmup_updates, "0", 0, 1e15, "updates", "--warmup-updates",
            "The learning rate rises linearly from zero to lr over this many updates. 0: no warmup."),
    REAL(optimizer, clip_step, "0.0", 0, false, NONE, true, "gradient norm", "--adagrad-clip",
         "With 'adagrad': a tensor whose gradient norm exceeds this takes a step scaled down by clip_step / norm; the "
         "accumulator sees the whole gradient. 0: off."),
    REAL(optimizer, clip_norm, "0.0", 0, false, NONE, true, "gradient norm", "--clip-norm",
         "The gradient of all parameters together is scaled down to this norm where it exceeds it. 0: off."),

    INTEGER(valid, interval, "1000", 0, 1e15, "updates", "--validate-interval-updates",
            "Updates between two validations. 0: never."),
    INTEGER(valid, streams, "32", 1, 1048576, "streams", "--batch-size-valid",
            "Streams that the split is cut into, shared out over the ranks. With fewer streams fewer tokens are "
            "predicted with little context, and validation takes longer."),
    INTEGER(
        valid, max_blocks, "0", 0, 1e15, "blocks", "",
        "Validation ends after this many blocks of data%tokens_per_sample tokens of each stream. 0: the whole split."),
    CHOICE(valid, split, "'valid'", "train valid test", "--valid-subset", "The split that validation reads."),

    INTEGER(checkpoint, interval, "1000", 1, 1e15, "updates", "--save-interval-updates",
            "Updates between two checkpoints. One more is written at the end, and one when the run is stopped by a "
            "signal."),
    INTEGER(checkpoint, keep, "3", 1, 1e15, "files", "--keep-interval-updates",
            "This many of the newest checkpoints are kept, and the best one besides."),
    LOGICAL(checkpoint, compress, ".true.", "",
            "Tensors in checkpoints are compressed without loss, in the format of HDF5's filters shuffle and deflate, "
            "which every reader of HDF5 has. Memories shrink to 0.34 of their size with 'bf16' and to 0.43 with "
            "'fp16', other tensors to 0.8. Writing and reading each take about 2 s a GB longer."),

    INTEGER(trace, interval, "25", 1, 1e15, "updates", "",
            "Updates between two rows of the trace (span of every head, bpc, learning rate, speed)."),
    REAL(trace, max_age, "30.0", 0, false, 1e9, false, "s", "",
         "Seconds between two writes of trace.h5, at least, while rows are missing from it. It is also written before "
         "every checkpoint and at the end. The writer thread writes it; rows that are not yet written are in memory "
         "only."),

    CHOICE(device, backend, "'auto'", "auto cpu cuda", "",
           "The backend. 'cpu': OpenBLAS and OpenMP. 'cuda': a GPU, one rank on each. 'auto': the GPU where there is "
           "one that can be used, else the CPU."),
    CHOICE(
        device, precision, "'auto'", "auto fp32 bf16 fp16", "--fp16",
        "Type of activations and of the operands of matrix products; parameters, reductions and statistics are always "
        "'fp32'. 'auto': 'bf16' on a GPU, 'fp32' on a CPU, which supports no other. 'fp16' uses loss scaling."),
    CHOICE(device, comm, "'auto'", "auto nccl mpi", "--ddp-backend",
           "How gradients are all-reduced over ranks. 'nccl': by NCCL, between GPUs, overlapped with backward; every "
           "rank needs a GPU of its own, and the loader must find libnccl.so.2. 'mpi': MPI_Allreduce after backward, "
           "through host memory where GPUs compute. 'auto': 'nccl' where it is available and there are several ranks, "
           "else 'mpi'."),
    CHOICE(device, shard_optimizer, "'auto'", "auto on off", "--zero-sharding",
           "With several ranks: 'on': gradients are reduce-scattered, each rank steps its shard of the parameters, and "
           "the new weights are all-gathered, with 'nccl' beside the next forward pass. 'off': gradients are "
           "all-reduced, and every rank steps all parameters. 'auto': 'on' with 'nccl', else 'off'. Checkpoints are "
           "the same."),
    INTEGER(
        device, bucket_bytes, "0", 0, 1e12, "bytes", "--bucket-cap-mb",
        "With 'nccl': size of a gradient bucket; each bucket is all-reduced, or reduce-scattered, as soon as backward "
        "has filled it. With a sharded optimizer the first layer has a bucket of its own. With 'mpi': size of a "
        "reduce-scatter, and on GPUs bytes that pass through host memory at a time. 0: 80000000 with 'nccl', a sharded "
        "optimizer and all ranks on one node, else 25000000."),
    REAL(device, timeout, "300.0", 0, false, NONE, true, "s", "",
         "With several ranks: the watchdog ends the run when a rank waits longer than this for the others, because one "
         "of them hangs or has died. Waits for rank 0's disk have no limit. 0: no limit."),
    STRING(device, timeline, "''", "",
           "File for the times at which gradients were ready and their all-reduces or reduce-scatters began and ended, "
           "in updates 11 to 20 after the start of the program: JSON lines, of rank 0 (doc/FILES.md). '': none."),
    REAL(device, loss_scale, "128.0", 1e-4, false, 1e9, false, "", "--fp16-init-scale",
         "Precision 'fp16' only: the first loss scale. The loss is multiplied by it before backward, so that small "
         "gradients do not underflow. It is halved after an update whose loss or gradients are not finite, which is "
         "skipped but counts as an update, and doubled after device%loss_scale_window updates without one; below "
         "0.0001 the run ends. A resumed run takes the loss scale of its checkpoint."),
    INTEGER(device, loss_scale_window, "2000", 1, 1e9, "updates", "--fp16-scale-window",
            "Precision 'fp16' only: updates without overflow after which the loss scale is doubled."),
    INTEGER(device, threads, "0", 0, 4096, "threads", "",
            "OpenMP threads of a rank. 0: as OMP_NUM_THREADS says, and without it the cores of the node shared out "
            "over its ranks."),

    STRING(eval, checkpoint, "''", "--path", "The checkpoint to evaluate. '': best.h5 of run%directory, else last.h5."),
    CHOICE(eval, split, "'test'", "train valid test", "--gen-subset", "The split to evaluate."),
    INTEGER(eval, streams, "8", 1, 1048576, "streams", "--batch-size",
            "Streams that the split is cut into, shared out over the ranks. Every token is predicted once whatever the "
            "number; only the first tokens of each stream are predicted with little context."),
    INTEGER(eval, tokens_per_sample, "512", 1, 1048576, "tokens", "--tokens-per-sample",
            "Length of a block in evaluation; the memory carries over from block to block."),
    INTEGER(eval, max_blocks, "0", 0, 1e15, "blocks", "",
            "Evaluation ends after this many blocks of each stream. 0: the whole split."),
    STRING(eval, nll_file, "''", "", "HDF5 file for the negative log likelihood of every token, in nats. '': none."),
    STRING(eval, attention_file, "''", "",
           "HDF5 file for attention weights: of each head the mean weight at each distance over the predicted tokens, "
           "and its weights at eval%attention_positions positions. '': none."),
    INTEGER(eval, attention_positions, "8", 0, 65536, "tokens", "",
            "Predicted tokens, evenly spread over the split, at which eval%attention_file holds the weights of every "
            "head. 0: mean weights alone."),
    STRING(
        eval, attention_at, "''", "",
        "The predicted tokens themselves, counted from 0 at the start of the split, with blanks between, in place of "
        "evenly spread ones. '': eval%attention_positions of them."),

    STRING(generate, checkpoint, "''", "--path",
           "The checkpoint to generate from. '': best.h5 of run%directory, else last.h5."),
    STRING(generate, prompt, "''", "",
           "The text that is continued, in symbols of the corpus's vocabulary. \\n, \\t, \\r, \\\\ and \\xHH (two "
           "hexadecimal "
           "digits) stand for a line end, a tab, a carriage return, a backslash and any byte. Instead of prompt_file."),
    STRING(generate, prompt_file, "''", "", "A file whose bytes, as they are, are the text that is continued."),
    INTEGER(generate, tokens, "512", 1, 1e15, "tokens", "", "How many tokens each sample generates at most."),
    INTEGER(generate, samples, "1", 1, 65536, "samples", "",
            "Texts that continue the prompt, shared out over the ranks. Sample k is the same text whatever the number "
            "of samples and ranks, where micro_samples is 1. With several samples a line '--- sample K of N ---' "
            "precedes each."),
    INTEGER(
        generate, micro_samples, "0", 0, 65535, "samples", "",
        "Samples of a rank that are computed at once. More are faster, and their products may round differently. 0: "
        "1 on a CPU, up to 64 on a GPU."),
    REAL(generate, temperature, "1.0", 0, false, NONE, true, "", "--temperature",
         "Logits are divided by this before sampling: below 1 favours likely symbols, above 1 unlikely ones. 0: always "
         "the most likely symbol."),
    INTEGER(generate, top_k, "0", 0, 16777216, "symbols", "--sampling-topk",
            "Only this many most likely symbols are sampled from. 0: all of them; 1: always the most likely one."),
    REAL(generate, top_p, "1.0", 0, true, 1, false, "probability", "--sampling-topp",
         "Of the symbols that top_k leaves, only the fewest most likely ones whose probabilities add up to this are "
         "sampled from. 1: all of them."),
    INTEGER(generate, seed, "-1", -1, 9007199254740992.0, "", "--seed", "Seed of the sampling. -1: run%seed."),
    STRING(generate, stop, "''", "",
           "A sample ends before this text where it generates it. Escapes as in prompt. '': no such text."),
    STRING(generate, output, "''", "", "File for the text of all samples. '': standard output."),

    STRING(compress, input, "''", "",
           "The file to compress, of at most 16 GiB, or to decompress. It is held in memory."),
    STRING(compress, output, "''", "", "The file to write: packed, or the original."),
    STRING(
        compress, checkpoint, "''", "--path",
        "The checkpoint whose model predicts. `viaduct decompress` needs the very file that compressed. '': best.h5 of "
        "run%directory, else last.h5."),
    INTEGER(compress, streams, "0", 0, 65536, "streams", "",
            "Parts of nearly equal length that `viaduct compress` cuts the file into; all advance together, and each "
            "begins "
            "without context. 0: one for every 4096 bytes, at most 32. The packed file holds the number."),
    INTEGER(
        compress, group, "8", 1, 65536, "streams", "",
        "Streams that `viaduct compress` computes at once: more are faster. A rank has whole groups, so that at most "
        "streams / group ranks share the work. The packed file holds the number."),
    LOGICAL(compress, ignore_build, ".false.", "",
            ".true.: `viaduct decompress` tries a file that another build, BLAS or C library packed. The original is "
            "written only if its SHA-256 is the right one, which is known at the end."),

    STRING(prepare, source, "''", "",
           "A file of raw bytes, plain or packed (zip, gzip, bzip2, xz, lzma, zstd, lz4); each byte is a token, and "
           "the splits are consecutive parts "
           "of it. Instead of the three texts below."),
    STRING(prepare, train_text, "''", "--trainpref",
           "Pre-tokenised text of the training split, symbols with blanks between, as fairseq's preprocessing reads "
           "it; or NAME.bin that fairseq-preprocess wrote, with NAME.idx and dict.txt beside it, whose symbols become "
           "the vocabulary. Given together with valid_text and test_text."),
    STRING(prepare, valid_text, "''", "--validpref", "The same for the validation split."),
    STRING(prepare, test_text, "''", "--testpref", "The same for the test split."),
    REAL(prepare, train, "90e6", 0, true, 1e15, false, "tokens, or fraction of the source up to 1", "",
         "Size of the training split, the first part of the source."),
    REAL(prepare, valid, "5e6", 0, false, 1e15, false, "tokens, or fraction of the source up to 1", "",
         "Size of the validation split, which follows the training split."),
    REAL(prepare, test, "5e6", 0, false, 1e15, false, "tokens, or fraction of the source up to 1", "",
         "Size of the test split, which follows the validation split."),
    STRING(
        prepare, vocabulary, "'found'", "--srcdict",
        "The symbols of the corpus. 'found': those of the source. 'bytes': all 256 bytes. Anything else: the path of a "
        "corpus or a checkpoint whose vocabulary is taken over; a symbol of the source that it lacks is an error."),
    INTEGER(prepare, shard_tokens, "16777216", 1, 1e15, "tokens", "",
            "Tokens in one shard file; the last shard of a split may hold fewer."),
    INTEGER(prepare, deflate, "0", 0, 9, "", "",
            "Compression of the shards: 0 none, 1 fastest, 9 smallest. Reading then costs time."),
    LOGICAL(prepare, overwrite, ".false.", "",
            ".true.: replace a corpus at data%path that was made from something else or in another way."),
};
const size_t vd_n_variables = sizeof vd_variables / sizeof *vd_variables;
_Static_assert(sizeof vd_variables / sizeof *vd_variables <= VD_VARIABLES, "make VD_VARIABLES in settings.h larger");
