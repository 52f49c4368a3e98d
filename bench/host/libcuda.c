/* A stand-in for NVIDIA's driver: it says yes to all that Triton asks of it, and counts launches instead of making
   them. */
#include "cuda.h"

int launches;
static char something;
#define CALL(name, ...) CUresult name(__VA_ARGS__)

CALL(cuGetErrorString, CUresult error, const char **text) { *text = "the stand-in for libcuda"; return CUDA_SUCCESS; }
CALL(cuDriverGetVersion, int *version) { *version = 13000; return CUDA_SUCCESS; }
CALL(cuDeviceGet, CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CALL(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device) {
  *context = (CUcontext)&something;
  return CUDA_SUCCESS;
}
CALL(cuCtxGetCurrent, CUcontext *context) { *context = (CUcontext)&something; return CUDA_SUCCESS; }
CALL(cuCtxSetCurrent, CUcontext context) { return CUDA_SUCCESS; }
CALL(cuCtxGetLimit, size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CALL(cuCtxSetLimit, CUlimit limit, size_t value) { return CUDA_SUCCESS; }
/* Shared memory of a block, in bytes, as on 9.0; every other number is only compared with it. */
CALL(cuDeviceGetAttribute, int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 227 * 1024;
  return CUDA_SUCCESS;
}
CALL(cuModuleLoadData, CUmodule *module, const void *image) { *module = (CUmodule)image; return CUDA_SUCCESS; }
CALL(cuModuleGetFunction, CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CALL(cuFuncGetAttribute, int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CALL(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CALL(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CALL(cuPointerGetAttribute, void *found, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)found = pointer;
  return CUDA_SUCCESS;
}
CALL(cuLaunchKernelEx, const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  launches++;
  return CUDA_SUCCESS;
}
