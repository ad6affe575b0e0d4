/* Programmatic dependent launch (CUDA C++ Programming Guide): a kernel is launched, and its blocks become resident,
 * while the previous kernel in the stream still runs. Without it each of about 300 kernels of an update starts 1.5
 * us after the previous one has ended. */
#ifndef VD_PDL_CUH
#define VD_PDL_CUH

#include <cuda_runtime.h>

/* Stream-ordered. Launches `kernel` with n launch attributes. Returns the error of the launch. */
template <typename... PARAMS, typename... ARGS>
static cudaError_t vd_launch_attributes(cudaLaunchAttribute *attribute, unsigned n, void (*kernel)(PARAMS...),
                                        dim3 grid, dim3 block, size_t shared, cudaStream_t stream, ARGS... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = attribute, config.numAttrs = n;
  return cudaLaunchKernelEx(&config, kernel, (PARAMS)args...);
}

/* Not collective. The attribute of a programmatic dependent launch. */
static inline cudaLaunchAttribute vd_pdl_attribute() {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}

/* Stream-ordered. Launches a kernel as a programmatic dependent launch; the kernel calls vd_pdl_wait(). */
template <typename... PARAMS, typename... ARGS>
static cudaError_t vd_launch_pdl(void (*kernel)(PARAMS...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                                 ARGS... args) {
  cudaLaunchAttribute early = vd_pdl_attribute();
  return vd_launch_attributes(&early, 1, kernel, grid, block, shared, stream, args...);
}

/* A kernel calls this before it touches what the previous kernel in the stream reads or writes. Kernels before that one
 * have ended: each lets the next one be launched only after its own wait. Waits until the previous kernel in the stream
 * has ended and its writes are visible; then lets the next kernel be launched. */
static __device__ __forceinline__ void vd_pdl_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
/* The two halves of vd_pdl_wait, for the dQ kernel: where it let the dK/dV kernel be launched at its start instead of
 * from its last work item on, both took 1 % longer. */
static __device__ __forceinline__ void vd_pdl_wait_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
static __device__ __forceinline__ void vd_pdl_launch_next() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#endif
