/* Opening a GPU backend without the program around it, for the checks and benches of tests/gpu/. */
#ifndef VD_TEST_GPU_OPS_H
#define VD_TEST_GPU_OPS_H

#include "src/ops/cuda_plugin.h"

/* Not collective. The table of the CUDA library, VIADUCT_CUDA_LIBRARY or else libviaduct_cuda.so where the loader
 * looks; it stays loaded. NULL with *err filled where it is missing or of another build. */
const vd_cuda_plugin *gpu_table(vd_error *err);
/* Not collective. "fp32", "bf16" or "fp16"; VD_USAGE for other words. */
int gpu_precision(const char *word, enum vd_precision *precision, vd_error *err);

#endif
