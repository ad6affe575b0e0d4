/* Warpgroup matrix products (wgmma, Hopper): shared-memory matrix descriptors, the instructions, their ordering.
 *
 * All operands are 16 bits wide; a product has 64 rows (16 a warp of the warpgroup), N = 8, 64, 96 or 128 columns, and
 * fp32 accumulators. Element c[j][2 ih + jj] of lane 4 g + t is row 16 warp + g + 8 ih, column 8 j + 2 t + jj.
 *
 * An operand in shared memory lies in panels of rows of 128 bytes, swizzled as vd_swizzled_chunk() does it (the
 * 128-byte swizzle of the hardware), eight rows to 1024 bytes; panels start at multiples of 1024 bytes. K-major: a row
 * is a row (A) or column (B) of the product and holds 64 contracted elements. MN-major: a row is one contracted index
 * and holds 64 rows or columns of the product; the next 64 are in the next panel. */
#ifndef VD_WGMMA_CUH
#define VD_WGMMA_CUH

#include "cuda/kernels/mma.cuh"

#include <type_traits>

/* How an operand lies, as the step of its descriptor from 16 contracted elements to the next 16, in units of 16 bytes:
 * 32 bytes along the rows, or 16 rows further. */
enum { VD_K_MAJOR = 2, VD_MN_MAJOR = 128 };

/* The shared-memory matrix descriptor of the operand at p: start address, leading byte offset (from one panel to the
 * next; not read for a single panel), stride byte offset (from eight rows to the next eight), 128-byte swizzle. BOUNDED
 * tells the compiler that addresses are below 2^18, so that it steps a descriptor without carries: in loops whose
 * descriptor changes at each iteration that saves instructions. */
template <bool BOUNDED = false> VD_DEV uint64_t vd_smem_descriptor(const void *p, int panel_bytes = 16) {
  const uint32_t address = vd_smem_address(p) & (BOUNDED ? 0x3ffffU : 0xffffffffU);
  return (uint64_t)(address >> 4) | (uint64_t)(panel_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

/* Accumulators as operands of an asm statement, and their names in it. */
#define VD_ACC(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define VD_ACC_8 VD_ACC(0)
#define VD_ACC_64 VD_ACC(0), VD_ACC(1), VD_ACC(2), VD_ACC(3), VD_ACC(4), VD_ACC(5), VD_ACC(6), VD_ACC(7)
#define VD_ACC_96 VD_ACC_64, VD_ACC(8), VD_ACC(9), VD_ACC(10), VD_ACC(11)
#define VD_ACC_128                                                                                                     \
  VD_ACC_64, VD_ACC(8), VD_ACC(9), VD_ACC(10), VD_ACC(11), VD_ACC(12), VD_ACC(13), VD_ACC(14), VD_ACC(15)
#define VD_NAMES_8 "%0,%1,%2,%3"
#define VD_NAMES_64                                                                                                    \
  VD_NAMES_8 ",%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
             "%31"
#define VD_NAMES_96 VD_NAMES_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define VD_NAMES_128                                                                                                   \
  VD_NAMES_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"  \
              "%57,%58,%59,%60,%61,%62,%63"
/* One instruction m64nNk16; the operands named in it: A, B, whether to add to c, transposition of A and B. */
#define VD_WGMMA_TEXT(N, TYPE, A, B, ADD, TRANS)                                                                       \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                                     \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VD_NAMES_##N "}, " A ", " B ", p, 1, 1, " TRANS \
                                                                                    ";\n}"
#define VD_WGMMA_SS(N, TYPE, A, B, ADD, TRANS)                                                                         \
  asm volatile(VD_WGMMA_TEXT(N, TYPE, A, B, ADD, TRANS)                                                                \
               : VD_ACC_##N                                                                                            \
               : "l"(a), "l"(b), "r"((int)add), "n"(A_MAJOR == VD_MN_MAJOR), "n"(B_MAJOR == VD_MN_MAJOR))
#define VD_WGMMA_RS(N, TYPE, A, B, ADD, TRANS)                                                                         \
  asm volatile(VD_WGMMA_TEXT(N, TYPE, A, B, ADD, TRANS)                                                                \
               : VD_ACC_##N                                                                                            \
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b), "r"((int)add),                            \
                 "n"(B_MAJOR == VD_MN_MAJOR))

/* Starts c [64, N] = a b, or += where `add`, 16 contracted; a and b are descriptors. Asynchronous. */
template <typename T, int N, int A_MAJOR, int B_MAJOR>
VD_DEV void vd_wgmma_ss(float (*c)[4], uint64_t a, uint64_t b, bool add) {
  constexpr bool half = std::is_same<T, __half>::value;
  static_assert(N == 8 || N == 64 || N == 96 || N == 128, "columns of a product");
  if constexpr (N == 8 && half) VD_WGMMA_SS(8, "f16", "%4", "%5", "%6", "%7, %8");
  if constexpr (N == 8 && !half) VD_WGMMA_SS(8, "bf16", "%4", "%5", "%6", "%7, %8");
  if constexpr (N == 64 && half) VD_WGMMA_SS(64, "f16", "%32", "%33", "%34", "%35, %36");
  if constexpr (N == 64 && !half) VD_WGMMA_SS(64, "bf16", "%32", "%33", "%34", "%35, %36");
  if constexpr (N == 96 && half) VD_WGMMA_SS(96, "f16", "%48", "%49", "%50", "%51, %52");
  if constexpr (N == 96 && !half) VD_WGMMA_SS(96, "bf16", "%48", "%49", "%50", "%51, %52");
  if constexpr (N == 128 && half) VD_WGMMA_SS(128, "f16", "%64", "%65", "%66", "%67, %68");
  if constexpr (N == 128 && !half) VD_WGMMA_SS(128, "bf16", "%64", "%65", "%66", "%67, %68");
}
/* The same with A in registers: each warp holds its 16 rows of it. */
template <typename T, int N, int B_MAJOR>
VD_DEV void vd_wgmma_rs(float (*c)[4], const vd_frag_a<T> &a, uint64_t b, bool add) {
  constexpr bool half = std::is_same<T, __half>::value;
  static_assert(N == 64 || N == 96, "columns of a product");
  if constexpr (N == 64 && half) VD_WGMMA_RS(64, "f16", "{%32,%33,%34,%35}", "%36", "%37", "%38");
  if constexpr (N == 64 && !half) VD_WGMMA_RS(64, "bf16", "{%32,%33,%34,%35}", "%36", "%37", "%38");
  if constexpr (N == 96 && half) VD_WGMMA_RS(96, "f16", "{%48,%49,%50,%51}", "%52", "%53", "%54");
  if constexpr (N == 96 && !half) VD_WGMMA_RS(96, "bf16", "{%48,%49,%50,%51}", "%52", "%53", "%54");
}

/* Starts c [64, N] = a b, or += where `add`, 64 contracted: four instructions. */
template <typename T, int N, int A_MAJOR, int B_MAJOR>
VD_DEV void vd_wgmma_k64_ss(float (*c)[4], uint64_t a, uint64_t b, bool add) {
#pragma unroll
  for (int i = 0; i < 4; i++) vd_wgmma_ss<T, N, A_MAJOR, B_MAJOR>(c, a + i * A_MAJOR, b + i * B_MAJOR, add || i > 0);
}
/* The same with A in registers. */
template <typename T, int N, int B_MAJOR>
VD_DEV void vd_wgmma_k64_rs(float (*c)[4], const vd_frag_a<T> a[4], uint64_t b, bool add) {
#pragma unroll
  for (int i = 0; i < 4; i++) vd_wgmma_rs<T, N, B_MAJOR>(c, a[i], b + i * B_MAJOR, add || i > 0);
}

/* Orders this warp's accesses to accumulator registers before the products that follow. */
VD_DEV void vd_wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/* Closes a group of started products. */
VD_DEV void vd_wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Waits until all groups but the N newest are complete. */
template <int N> VD_DEV void vd_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* Makes this thread's writes and completed copies to shared memory visible to products (the async proxy), once a
 * barrier has followed. */
VD_DEV void vd_fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/* After a wait: keeps the compiler, which does not know that products write the 4 N accumulators of a lane meanwhile,
 * from moving uses of them before the wait. */
template <int N> VD_DEV void vd_wgmma_fence_operand(float (*c)[4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) asm volatile("" : "+f"(c[i >> 2][i & 3])::"memory");
}

#undef VD_ACC
#undef VD_ACC_8
#undef VD_ACC_64
#undef VD_ACC_96
#undef VD_ACC_128
#undef VD_NAMES_8
#undef VD_NAMES_64
#undef VD_NAMES_96
#undef VD_NAMES_128
#undef VD_WGMMA_TEXT
#undef VD_WGMMA_SS
#undef VD_WGMMA_RS

#endif
