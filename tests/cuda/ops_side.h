/* One op on one backend. Arguments and results are arrays of double. ops_side.c is compiled twice: with VD_DOUBLE it
 * drives the double CPU reference, without it the GPU, through the table that libviaduct_cuda.so exports. */
#ifndef VD_TEST_OPS_SIDE_H
#define VD_TEST_OPS_SIDE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum side_precision { SIDE_FP32, SIDE_BF16, SIDE_FP16 };

enum side_op {
  SIDE_COPY_ACT, /* buffer 0 through put_act and get_act */
  SIDE_EMBED,
  SIDE_EMBED_BACKWARD,
  SIDE_LINEAR,
  SIDE_LINEAR_BACKWARD,
  SIDE_ADD_NORM,
  SIDE_ADD_NORM_BACKWARD,
  SIDE_NORM_LINEAR,
  SIDE_PROJECT,
  SIDE_PROJECT_BACKWARD,
  SIDE_ATTENTION,
  SIDE_ATTENTION_BACKWARD,
  SIDE_RELATIVE_PROJECT, /* the same four with relative keys: tests/cuda/test_ops_relative.c */
  SIDE_RELATIVE_PROJECT_BACKWARD,
  SIDE_RELATIVE_ATTENTION,
  SIDE_RELATIVE_ATTENTION_BACKWARD,
  SIDE_MEMORY_PUSH,
  SIDE_MEMORY_RING_PUSH,
  SIDE_CROSS_ENTROPY,
  SIDE_ADD_CONSTANT,
  SIDE_SQUARE_SUMS,
  SIDE_ADAGRAD,
  SIDE_CLAMP,
  SIDE_ADAM,
  SIDE_SCALE_DROPOUT,
  SIDE_POSITION_ENCODINGS,
  SIDE_WEIGHT_GRADIENT
};

/* PARAM: a parameter, in the arena that is passed to weights_changed. REAL: any other array of parameters' type. */
enum side_kind { SIDE_PARAM, SIDE_REAL, SIDE_ACT, SIDE_TOKEN, SIDE_SUM };

enum { SIDE_BUFFERS = 20, SIDE_HEADS = 16, SIDE_TENSORS = 8, SIDE_CHOSEN = 3 };

/* One array: its contents before the op, and then what it holds after. n = 0: the op gets NULL. */
typedef struct side_buffer {
  enum side_kind kind;
  size_t n;
  double *x;
} side_buffer;

/* An op with its sizes; buffers in the order of the op's parameters. */
typedef struct side_call {
  enum side_op op;
  int64_t n, in, out; /* rows, widths */
  int64_t vocab;
  bool relu, accumulate, branch_drops;
  double p; /* dropout */
  uint64_t seed;
  uint32_t update;
  uint16_t layer;
  int64_t row0;
  double scale, value, lr, eps, clip_step, clip_norm, beta1, beta2;
  int64_t t;         /* Adam's updates */
  uint16_t site;     /* scale_dropout's */
  int64_t clamp_len; /* of the position encodings */
  /* attention */
  int64_t n_stream, block, window, n_head, d_head, attn_span, ramp, n_span, memory_rows, oldest;
  int64_t kv_spare;          /* rows of a stream's projected memory beyond the window, forward */
  int64_t stride;            /* elements between rows of memory_ring_push's block, of cross_entropy's logits */
  bool trimmed, same_buffer; /* same_buffer: memory_push, cross_entropy and scale_dropout in place */
  bool sliced; /* relative keys: queries', keys' and values' weights are slices of one tensor, the first one given */
  int64_t reach[SIDE_HEADS], own[SIDE_HEADS]; /* own: as far back as a head needs values */
  int64_t n_distance;                         /* > 0: attention records weights; targets, sums and weights follow lse */
  int64_t chosen[SIDE_CHOSEN];
  /* memory_push: rows_old, rows_new are memory_rows and window; tensors of the optimiser */
  int n_tensor;
  size_t offset[SIDE_TENSORS], size[SIDE_TENSORS];
  double norm2[SIDE_TENSORS]; /* out of square_sums */
  int n_buffer;
  side_buffer buffer[SIDE_BUFFERS];
} side_call;

typedef struct side side;

/* Not collective. Opens the backend of the side; precision and library (libviaduct_cuda.so's path) matter on the GPU
 * only. NULL, after printing the reason, where it cannot be opened. Free with *_close. */
side *side_cpu_open(enum side_precision precision, const char *library);
/* Not collective. The same for the GPU. */
side *side_gpu_open(enum side_precision precision, const char *library);
/* Not collective. Runs the op and waits; contents of the buffers are replaced by what they hold afterwards. False,
 * with the reason printed, where the backend fails. */
bool side_cpu_run(side *s, side_call *call);
/* Not collective. The same for the GPU. */
bool side_gpu_run(side *s, side_call *call);
/* Not collective. NULL is allowed. */
void side_cpu_close(side *s);
/* Not collective. NULL is allowed. */
void side_gpu_close(side *s);

#endif
