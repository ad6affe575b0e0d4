/* The forward kernel by wgmma for bf16 heads of 65 to 96 columns. */
#define VD_HEAD_WIDTH 96
#include "cuda/attention/fwd_wgmma.cu"
