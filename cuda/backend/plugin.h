/* Creation of the backend. */
#ifndef VD_CUDA_PLUGIN_OPS_H
#define VD_CUDA_PLUGIN_OPS_H

#include "src/ops/cuda_plugin.h"

/* Not collective. Makes the backend on a GPU that the kernels were built for: vd_cuda_plugin.ops. */
int vd_cuda_ops(vd_ops **o, int device, enum vd_precision precision, vd_error *err);

#endif
