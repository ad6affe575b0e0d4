/* The exported table vd_cuda: GPUs of the node, the backend on one of them, timing, NCCL. */
#include "cuda/backend/context.h"
#include "cuda/backend/nccl.h"
#include "cuda/backend/plugin.h"
#include "cuda/backend/timing.h"

#include <stdio.h>
#include <string.h>

/* The kernels are built for compute capability 9.0 alone (sm_90a): wgmma exists on Hopper only. */
enum { VD_MAJOR = 9, VD_MINOR = 0 };

static int gpu_count(int *n, vd_error *err) {
  int driver = 0, runtime = 0;
  cudaError_t e = cudaGetDeviceCount(n);
  if (e == cudaSuccess && *n > 0) return VD_OK;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return vd_fail(err, VD_FAILED, "this node has no NVIDIA driver");
  if (e == cudaErrorInsufficientDriver)
    return vd_fail(err, VD_FAILED,
                   "the NVIDIA driver is too old: it supports CUDA %d.%d, this program was built with %d.%d",
                   driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  if (e == cudaErrorNoDevice || e == cudaSuccess)
    return vd_fail(err, VD_FAILED, "no GPU is visible on this node (is CUDA_VISIBLE_DEVICES set?)");
  return vd_fail(err, VD_FAILED, "cudaGetDeviceCount failed: %s", cudaGetErrorString(e));
}

/* Dense bf16 FLOP/s of the GPUs that the kernels run on (NVIDIA H100 Tensor Core GPU datasheet, 2023: SXM 989 TFLOP/s,
 * PCIe 756; H200 as H100 SXM). */
static double peak_of(const char *name) {
  if (strstr(name, "H100 PCIe") || strstr(name, "H200 NVL")) return 756e12;
  if (strstr(name, "H100") || strstr(name, "H200") || strstr(name, "GH200")) return 989e12;
  return 0;
}

static int gpu_describe(int device, vd_gpu *gpu, vd_error *err) {
  struct cudaDeviceProp p;
  *gpu = (vd_gpu){0};
  cudaError_t e = cudaGetDeviceProperties(&p, device);
  if (e == cudaSuccess) e = cudaSetDevice(device);
  if (e == cudaSuccess) e = cudaMemGetInfo(&gpu->free_bytes, &gpu->total_bytes);
  if (e == cudaSuccess) e = cudaDriverGetVersion(&gpu->driver);
  if (e == cudaSuccess) e = cudaRuntimeGetVersion(&gpu->runtime);
  if (e != cudaSuccess) return vd_fail(err, VD_FAILED, "GPU %d: %s", device, cudaGetErrorString(e));
  snprintf(gpu->name, sizeof gpu->name, "%.*s", (int)sizeof gpu->name - 1, p.name);
  memcpy(gpu->uuid, p.uuid.bytes, sizeof gpu->uuid);
  gpu->major = p.major;
  gpu->minor = p.minor;
  gpu->multiprocessors = p.multiProcessorCount;
  gpu->peak = peak_of(p.name);
  return VD_OK;
}

static int gpu_ops(vd_ops **o, int device, enum vd_precision precision, vd_error *err) {
  int major = 0, minor = 0;
  cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (e != cudaSuccess) return vd_fail(err, VD_FAILED, "GPU %d: %s", device, cudaGetErrorString(e));
  if (major != VD_MAJOR || minor != VD_MINOR)
    return vd_fail(err, VD_FAILED, "GPU %d has compute capability %d.%d; the kernels are built for %d.%d (Hopper)",
                   device, major, minor, VD_MAJOR, VD_MINOR);
  return vd_cuda_ops(o, device, precision, err);
}

extern const vd_cuda_plugin vd_cuda;
__attribute__((visibility("default"))) const vd_cuda_plugin vd_cuda = {
    VD_CUDA_INTERFACE, gpu_count, gpu_describe, gpu_ops, vd_cuda_event_record, vd_cuda_event_elapsed, vd_cuda_nccl};
