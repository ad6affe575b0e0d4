/* The choices that a deck names and that other rooms act on: one definition each, for the reader of decks, the model,
 * the backends and the kernels. The settings table gives the words in the order of these enums. */
#ifndef VD_CHOICES_H
#define VD_CHOICES_H

/* run%progress: the live line where the output is a person's terminal; always; never. */
enum vd_progress_style { VD_PROGRESS_AUTO, VD_PROGRESS_LINE, VD_PROGRESS_PLAIN };

/* model%arch: arXiv 1905.07799, arXiv 1901.02860. */
enum vd_arch { VD_ADAPTIVE_SPAN, VD_TRANSFORMER_XL };

/* model%init: as published, or as fairseq's adaptive_span example. */
enum vd_init { VD_INIT_PUBLISHED, VD_INIT_FAIRSEQ };

/* span%softmax: after the soft mask, or over the layer's window before it. */
enum vd_softmax { VD_MASKED, VD_TRIMMED };

/* memory%initial: rows of a memory at the start of an epoch or an evaluation. */
enum vd_initial_memory { VD_MEMORY_EMPTY, VD_MEMORY_ZEROS };

/* optimizer%method and optimizer%schedule. */
enum vd_method { VD_ADAGRAD, VD_ADAM };
enum vd_schedule { VD_CONSTANT, VD_COSINE };

/* The splits of a corpus. */
enum vd_split { VD_SPLIT_TRAIN, VD_SPLIT_VALID, VD_SPLIT_TEST, VD_N_SPLIT };

/* device%backend. */
enum vd_backend { VD_BACKEND_AUTO, VD_BACKEND_CPU, VD_BACKEND_CUDA };

/* device%precision: type of activations and of the operands of matrix products. Parameters, sums and statistics are
 * fp32 in all of them. VD_PRECISION_AUTO stands in decks only. */
enum vd_precision { VD_PRECISION_AUTO, VD_FP32, VD_BF16, VD_FP16 };

/* device%comm: how gradients are all-reduced. VD_COMM_AUTO stands in decks only. */
enum vd_comm { VD_COMM_AUTO, VD_COMM_NCCL, VD_COMM_MPI };

/* device%shard_optimizer: does each rank step a shard of the parameters, or all of them? */
enum vd_shard_optimizer { VD_SHARD_AUTO, VD_SHARD_ON, VD_SHARD_OFF };

#endif
