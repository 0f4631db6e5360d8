// What torch's CUDA build asks of a driver before its autograd walks over tensors that say cuda, where there is none.
// Loaded before torch (LD_PRELOAD) under the name of the driver's library: preload.py.
static int devices = 0;  // none, until torch has been imported without a GPU
extern "C" void pretend_devices(int count) { devices = count; }

namespace c10::cuda {
signed char device_count() noexcept { return devices; }
bool hasPrimaryContext(signed char) { return false; }
}  // namespace c10::cuda

// Torch looks these up by name and, without a context, calls none of them but the first two: 100 is "no device".
#define ABSENT(name) extern "C" int name() { return 100; }
extern "C" int cuInit() { return 0; }
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { return *flags = *active = 0; }
ABSENT(cuCtxGetCurrent) ABSENT(cuCtxGetDevice) ABSENT(cuCtxGetLimit) ABSENT(cuCtxSetCurrent) ABSENT(cuCtxSetLimit)
ABSENT(cuDeviceGet) ABSENT(cuDeviceGetAttribute) ABSENT(cuDevicePrimaryCtxRetain) ABSENT(cuDriverGetVersion)
ABSENT(cuFuncGetAttribute) ABSENT(cuFuncSetAttribute) ABSENT(cuFuncSetCacheConfig) ABSENT(cuGetErrorString)
ABSENT(cuLaunchCooperativeKernel) ABSENT(cuLaunchKernel) ABSENT(cuLinkAddData_v2) ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate_v2) ABSENT(cuModuleGetFunction) ABSENT(cuModuleLoad) ABSENT(cuModuleLoadData)
ABSENT(cuModuleLoadDataEx) ABSENT(cuModuleUnload) ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor)
ABSENT(cuPointerGetAttribute) ABSENT(cuStreamIsCapturing) ABSENT(cuTensorMapEncodeTiled)
