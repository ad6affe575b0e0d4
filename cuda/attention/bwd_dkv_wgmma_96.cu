/* The dK/dV kernel by wgmma for bf16 heads of 65 to 96 columns. */
#define VD_HEAD_WIDTH 96
#include "cuda/attention/bwd_dkv_wgmma.cu"
