/* All-reduces of gradients by NCCL. */
#ifndef VD_CUDA_NCCL_H
#define VD_CUDA_NCCL_H

#include "src/ops/nccl_plugin.h"

/* Not collective. vd_cuda_plugin.nccl. */
const vd_nccl_plugin *vd_cuda_nccl(void);

#endif
