/* Shared by the cases of test_ops: random inputs, both backends, the comparison.
 *
 * Bounds, relative to the norm of what is compared. fp32 (unit roundoff 6e-8; products of fp32 accuracy): 1e-5 allows
 * for sums of some thousand terms. bf16 (8 bits, unit roundoff 2^-8 = 4e-3) and fp16: 2e-2. Inputs are rounded to
 * the type before either side sees them, so that only the op's own roundings differ: at most five
 * in a row (attention backward: weights, their gradient, the score's gradient, the result, out), and
 * five roundings of 4e-3 are 2e-2. fp16 rounds eight times finer but has the smaller range; it gets the same bound. */
#ifndef VD_TEST_OPS_CASE_H
#define VD_TEST_OPS_CASE_H

#include "tests/cuda/ops_side.h"

typedef struct ops_test {
  side *cpu, *gpu;
  enum side_precision precision;
  const char *only; /* cases whose name contains it; NULL: all */
  int passed, failed;
} ops_test;

/* Not collective. Appends a buffer of n uniform numbers in +-range, rounded to the precision where they are parameters
 * or activations; other numbers for every salt. Returns its index. n = 0: the op gets NULL. */
int case_noise(const ops_test *t, side_call *call, enum side_kind kind, size_t n, double range, uint64_t salt);
/* Not collective. Appends a buffer of n elements of `value`. Returns its index. */
int case_fill(side_call *call, enum side_kind kind, size_t n, double value);
/* Not collective. x as the precision stores it. */
double case_round(enum side_precision precision, double x);
/* Not collective. A number in 0..1 of a salt and an index. */
double case_uniform(uint64_t salt, size_t i);

/* Which elements of a result are compared. NULL: all. */
typedef bool case_wanted(const side_call *call, size_t element);
/* A result: a buffer, its name, which elements count; exact: the same elements must be zero as well. */
typedef struct case_result {
  int buffer;
  const char *name;
  case_wanted *wanted;
  bool exact_zeros;
} case_result;

/* Not collective. Runs the call on both sides and compares the n results; one line 'ok NAME' or 'not ok NAME' each.
 * Frees the buffers of the call. */
void case_check(ops_test *t, const char *name, side_call *call, const case_result *result, int n);
/* Not collective. Prints one line for a case that compared its results itself. */
void case_report(ops_test *t, const char *name, const char *result, bool good, double error, double bound);
/* Not collective. Is a case of this name to be run? */
bool case_selected(const ops_test *t, const char *name);
/* Not collective. A copy of the call with buffers of its own. */
side_call case_copy(const side_call *call);
/* Not collective. Frees the buffers of a call. */
void case_free(side_call *call);

/* Not collective. Elements of the outputs of an attention, and of its keys and values in memory. */
size_t case_rows(const side_call *c);
/* Not collective. As above. */
size_t case_memory(const side_call *c);
/* Not collective. Appends the two buffers of a vd_qkv, fifty times as large where no head reaches; queries and keys in
 * +-range, values in +-1, and 0 where a head reaches but needs no values. Returns the index of the first. */
int case_qkv(const ops_test *t, side_call *c, double range, uint64_t salt);
/* Not collective. Has the attention call record weights, for more distances than it reaches: appends targets, of which
 * every seventh is not counted, sums and weights. Chooses the first query, one in the middle and the last one. Returns
 * the index of the sums; the weights follow them. */
int case_record(side_call *c);
/* Not collective. Appends a vd_qkv of zeros but for values: of the group's d_head keys of each stream (from key group *
 * d_head on, the memory first), key e of the group has unit vector e in every head. */
void case_unit_values(side_call *c, int64_t group);
/* Not collective. Appends the two buffers of a vd_qkv that an op is to write. Returns the index of the first. */
int case_qkv_out(side_call *c);
enum { CASE_PARTS = 5 };
/* Not collective. What case_qkv_out appended at `buffer`, as results to compare: queries, keys and values of the block,
 * keys and values of the memory where their head needs their row. */
void case_parts(int buffer, case_result result[CASE_PARTS]);

/* Not collective. The cases, by what they are about. */
void test_dense(ops_test *t);
/* Not collective. */
void test_elementwise(ops_test *t);
/* Not collective. */
void test_attention_ops(ops_test *t);
/* Not collective. */
void test_project(ops_test *t);
/* Not collective. */
void test_update(ops_test *t);
/* Not collective. The ops of Transformer-XL. */
void test_relative(ops_test *t);

#endif
