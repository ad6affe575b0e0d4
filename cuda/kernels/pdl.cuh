/* Launches that get ready while the kernel before them in the stream ends (programmatic dependent launch, CUDA C++
 * Programming Guide): without it a kernel begins 1.5 us after the one before it, of some 400 in an update. */
#ifndef VD_LAUNCH_CUH
#define VD_LAUNCH_CUH

#include <cuda_runtime.h>

/* Stream-ordered. A launch with n attributes. */
template <typename... PARAMS, typename... ARGS>
static cudaError_t vd_launch_attributes(cudaLaunchAttribute *attribute, unsigned n, void (*kernel)(PARAMS...),
                                        dim3 grid, dim3 block, size_t shared, cudaStream_t stream, ARGS... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = attribute, config.numAttrs = n;
  return cudaLaunchKernelEx(&config, kernel, (PARAMS)args...);
}

/* Stream-ordered. Launches a kernel that begins with vd_pdl_wait(). */
template <typename... PARAMS, typename... ARGS>
static cudaError_t vd_launch_pdl(void (*kernel)(PARAMS...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                                 ARGS... args) {
  cudaLaunchAttribute ready = {};
  ready.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  ready.val.programmaticStreamSerializationAllowed = 1;
  return vd_launch_attributes(&ready, 1, kernel, grid, block, shared, stream, args...);
}

/* Before a kernel looks at memory: waits until the one before has ended and what it wrote can be read; lets the next
 * one get ready. */
static __device__ __forceinline__ void vd_pdl_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#endif
