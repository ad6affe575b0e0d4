/* Products of a warpgroup (wgmma, Hopper's own): 64 x 128 results of 16-bit operands that lie in shared memory.
 *
 * Operands lie in panels: rows of 128 bytes whose 16-byte chunks are swizzled as vd_swizzled_chunk does it, eight rows
 * to 1024 bytes, panels aligned to as much. A row is either one of the 64 or 128 places of results, and holds 64
 * elements that are contracted, or (across) it is one of the places that are contracted, and holds 64 places of
 * results; then the next 64 are in the next panel. A result's c[j][2 ih + jj] of lane 4 g + t is row 16 warp + g + 8
 * ih, column 8 j + 2t
 * + jj. */
#ifndef VD_WGMMA_CUH
#define VD_WGMMA_CUH

#include "cuda/kernels/mma.cuh"

#include <type_traits>

/* What the tensor core is told of an operand; panel: bytes from one panel to the next. */
VD_DEV uint64_t vd_smem_descriptor(const void *p, int panel) {
  return (uint64_t)((vd_smem_address(p) & 0x3ffff) >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

#define VD_RESULT(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define VD_RESULTS                                                                                                     \
  VD_RESULT(0), VD_RESULT(1), VD_RESULT(2), VD_RESULT(3), VD_RESULT(4), VD_RESULT(5), VD_RESULT(6), VD_RESULT(7),      \
      VD_RESULT(8), VD_RESULT(9), VD_RESULT(10), VD_RESULT(11), VD_RESULT(12), VD_RESULT(13), VD_RESULT(14),           \
      VD_RESULT(15)
#define VD_WGMMA(TYPE)                                                                                                 \
  "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                                           \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"    \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"   \
  "%58,%59,%60,%61,%62,%63}, "
#define VD_BOTH_SHARED "%64, %65, p, 1, 1, %66, %67;\n}\n"
#define VD_LEFT_HELD "{%64,%65,%66,%67}, %68, p, 1, 1, %69;\n}\n"

/* c += left right^T over 16 contracted elements, both in shared memory. Asynchronous. */
template <typename T, int LEFT_ACROSS, int RIGHT_ACROSS>
VD_DEV void vd_wgmma(float c[16][4], uint64_t left, uint64_t right) {
  if constexpr (std::is_same<T, __half>::value) {
    asm volatile(VD_WGMMA("f16") VD_BOTH_SHARED:VD_RESULTS
                 : "l"(left), "l"(right), "n"(LEFT_ACROSS), "n"(RIGHT_ACROSS));
  } else {
    asm volatile(VD_WGMMA("bf16") VD_BOTH_SHARED:VD_RESULTS
                 : "l"(left), "l"(right), "n"(LEFT_ACROSS), "n"(RIGHT_ACROSS));
  }
}
/* The same with the left operand in registers: each warp has its 16 rows of it. */
template <typename T, int RIGHT_ACROSS>
VD_DEV void vd_wgmma_held(float c[16][4], const vd_frag_a<T> &left, uint64_t right) {
  const uint32_t *x = left.x;
  if constexpr (std::is_same<T, __half>::value) {
    asm volatile(VD_WGMMA("f16") VD_LEFT_HELD:VD_RESULTS
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(right), "n"(RIGHT_ACROSS));
  } else {
    asm volatile(VD_WGMMA("bf16") VD_LEFT_HELD:VD_RESULTS
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(right), "n"(RIGHT_ACROSS));
  }
}

/* Between other uses of c, or of shared memory by copies of the program's own, and products. */
VD_DEV void vd_wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
VD_DEV void vd_wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Waits for all groups of products but the N last. */
template <int N> VD_DEV void vd_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* What this thread has written to shared memory, or its copies have, can be read by products after a barrier. */
VD_DEV void vd_fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/* Results of products, N times four of a lane, after waiting: keeps the compiler, which does not know that they change
 * meanwhile, from moving uses of them before this. */
template <int N> VD_DEV void vd_wgmma_fence_operand(float (*c)[4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) asm volatile("" : "+f"(c[i >> 2][i & 3])::"memory");
}

#endif
