#include "tests/gpu/gpu_ops.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

const vd_cuda_plugin *gpu_table(vd_error *err) {
  const char *path = getenv("VIADUCT_CUDA_LIBRARY");
  void *library = dlopen(path ? path : "libviaduct_cuda.so", RTLD_NOW | RTLD_LOCAL);
  const vd_cuda_plugin *table = library ? dlsym(library, "vd_cuda") : NULL;
  if (!table) {
    vd_fail(err, VD_FAILED, "the CUDA library: %s", dlerror());
  } else if (table->interface_version != VD_CUDA_INTERFACE) {
    vd_fail(err, VD_FAILED, "the CUDA library has interface %u, this program %u", table->interface_version,
            VD_CUDA_INTERFACE);
    table = NULL;
  }
  return table;
}

int gpu_precision(const char *word, enum vd_precision *precision, vd_error *err) {
  static const char *const words[] = {"fp32", "bf16", "fp16"};
  static const enum vd_precision value[] = {VD_FP32, VD_BF16, VD_FP16};
  for (int i = 0; i < 3; i++) {
    if (strcmp(word, words[i]) != 0) continue;
    *precision = value[i];
    return VD_OK;
  }
  return vd_fail(err, VD_USAGE, "%s is no precision: fp32, bf16, fp16", word);
}
