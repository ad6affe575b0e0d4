/* The cases of test_attention.cu: odd sizes, the edges of spans, splits, all widths of heads, many tiles. */
#ifndef VD_TESTS_ATTENTION_CASES_CUH
#define VD_TESTS_ATTENTION_CASES_CUH

#include <vector>

struct test_case {
  const char *name;
  int n_stream, block, window, n_head, d_head, attn_span, ramp, trimmed, n_span, memory_spare;
  double dropout;
  std::vector<float> z;
  double query_size = 1;
  int cut = 0; /* tiles of keys for which there is no room (vd_cuda_attention.key_tiles) */
};

static const std::vector<test_case> cases = {
    {"zero", 1, 64, 64, 1, 64, 64, 16, 0, 1, 0, 0, {0}},
    {"spans", 2, 70, 200, 5, 64, 200, 32, 0, 5, 0, 0, {0, 0.3f, 0.77f, 1, 0.05f}},
    {"dropout", 2, 70, 200, 5, 64, 200, 32, 0, 5, 0, 0.3, {0, 0.3f, 0.77f, 1, 0.05f}},
    {"integer", 2, 64, 128, 4, 64, 128, 32, 0, 4, 3, 0.3, {0.25f, 0.5f, 0.75f, 0.0078125f}},
    {"window", 3, 33, 77, 3, 64, 301, 10, 0, 3, 5, 0.3, {0.1f, 0.25f, 0.9f}},
    {"per_layer", 2, 100, 150, 3, 64, 150, 32, 0, 1, 0, 0.3, {0.4f}},
    {"trimmed", 2, 70, 136, 4, 64, 200, 32, 1, 4, 0, 0.3, {0, 0.3f, 0.5f, 0.1f}},
    {"trimmed_far", 2, 130, 708, 4, 64, 900, 32, 1, 4, 2, 0.3, {0, 0.04f, 0.35f, 1}},
    {"trimmed_sharp", 1, 128, 640, 2, 64, 640, 32, 1, 2, 0, 0.3, {0.02f, 0.3f}, 12},
    {"trimmed_wide", 1, 70, 300, 2, 128, 300, 20, 1, 2, 0, 0.3, {0.01f, 0.4f}},
    {"trimmed_full", 1, 64, 128, 3, 64, 128, 32, 1, 1, 0, 0.2, {1}},
    {"narrow", 2, 50, 90, 3, 32, 90, 8, 0, 3, 0, 0.3, {0.2f, 0.6f, 1}},
    {"padded", 1, 45, 90, 2, 24, 91, 8, 0, 2, 0, 0.3, {0.2f, 0.6f}},
    {"wide", 1, 70, 150, 2, 128, 160, 20, 0, 2, 0, 0.3, {0.1f, 0.7f}},
    {"wide_96", 2, 70, 200, 3, 96, 200, 32, 0, 3, 1, 0.3, {0, 0.3f, 0.9f}},
    {"wide_80", 1, 45, 300, 2, 80, 300, 16, 0, 2, 0, 0, {0.3f, 1}},
    {"wide_split", 1, 100, 1500, 2, 96, 1600, 32, 0, 2, 0, 0.3, {0.9f, 0.45f}},
    {"wide_far", 2, 130, 708, 4, 96, 900, 32, 1, 4, 2, 0.3, {0, 0.04f, 0.35f, 1}},
    {"one_query", 2, 1, 70, 2, 64, 70, 8, 0, 2, 0, 0.3, {0.1f, 0.9f}},
    {"block65", 1, 65, 65, 2, 64, 65, 8, 0, 2, 0, 0.3, {0.3f, 1}},
    {"long", 1, 130, 700, 2, 64, 700, 32, 0, 2, 0, 0.3, {0.8f, 0.04f}},
    {"cut", 2, 70, 700, 3, 64, 700, 32, 0, 3, 0, 0.3, {0.9f, 0.8f, 0.05f}, 1, 7},
    {"split", 2, 100, 1500, 3, 64, 1600, 32, 0, 3, 1, 0.3, {0.9f, 0.03f, 0.45f}},
    {"split_ramp", 1, 130, 1300, 2, 64, 1300, 700, 0, 1, 0, 0.2, {0.6f}},
    {"split_sharp", 1, 64, 1100, 2, 64, 1100, 32, 0, 2, 0, 0, {1, 0.5f}, 4},
    {"split_narrow", 1, 33, 900, 2, 40, 1000, 16, 0, 2, 0, 0.3, {0.85f, 0.7f}},
    /* more work than a GPU has blocks, so that a block takes several items */
    {"many", 24, 130, 80, 8, 16, 200, 32, 0, 1, 2, 0.3, {0.25f}},
    {"many_odd", 48, 40, 150, 12, 16, 150, 32, 0, 1, 0, 0.3, {0.6f}},
    {"split_many", 8, 200, 1500, 8, 16, 1600, 32, 0, 8, 0, 0.3, {0.9f, 0.02f, 0, 0.01f, 0.03f, 0, 0.02f, 0}},
    {"trimmed_many", 24, 130, 200, 8, 16, 200, 32, 1, 1, 0, 0.3, {0.1f}},
    {"wide_many", 36, 33, 80, 8, 72, 200, 32, 0, 1, 0, 0.3, {0.2f}},
};

/* Transformer-XL: relative keys, a fixed reach. */
struct relative_case {
  const char *name;
  int n_stream, block, window, n_head, d_head, attn_span, reach, biases, memory_spare;
  double dropout;
};

static const std::vector<relative_case> relative_cases = {
    {"xl_start", 2, 70, 0, 3, 64, 200, 69, 1, 0, 0},      {"xl_grows", 2, 70, 70, 3, 64, 200, 139, 1, 2, 0.2},
    {"xl_full", 2, 128, 128, 2, 64, 128, 255, 1, 0, 0},   {"xl_same", 2, 128, 128, 2, 64, 128, 127, 1, 0, 0.1},
    {"xl_short", 1, 100, 150, 3, 64, 150, 17, 1, 0, 0.2}, {"xl_self", 1, 70, 40, 2, 64, 40, 0, 1, 0, 0},
    {"xl_between", 2, 97, 77, 3, 64, 301, 120, 1, 5, 0},  {"xl_no_bias", 2, 65, 90, 2, 64, 90, 154, 0, 0, 0.3},
    {"xl_narrow", 2, 50, 90, 3, 32, 90, 100, 1, 0, 0},    {"xl_padded", 1, 45, 91, 2, 24, 91, 135, 1, 0, 0.3},
    {"xl_wide", 1, 70, 150, 2, 128, 160, 219, 1, 0, 0.3}, {"xl_one", 2, 1, 70, 2, 64, 70, 70, 1, 0, 0},
    {"xl_first", 2, 1, 0, 2, 64, 70, 0, 1, 0, 0},         {"xl_begin", 3, 40, 0, 3, 64, 40, 39, 1, 0, 0.1},
    {"xl_odd", 1, 33, 31, 4, 8, 64, 63, 1, 1, 0},         {"xl_long", 1, 200, 700, 2, 64, 700, 899, 1, 0, 0.1},
    {"xl_many", 24, 130, 80, 8, 16, 200, 209, 1, 1, 0.1},
};

#endif
