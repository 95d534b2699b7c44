// A libcuda.so.1 that launches nothing, for machines without a GPU: csrc/cuda/driver.cpp runs against it as against the real one.
// The environment says what it is like (tests/standin_driver.py); it counts what it is asked for.
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

int number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

struct Machine {
  int version = number("STANDIN_VERSION", 13000);
  int gpus = number("STANDIN_GPUS", 1);
  int capability = number("STANDIN_CAPABILITY", 80);
  int shared_bytes = number("STANDIN_SHARED_BYTES", 163 * 1024);
  std::string failing;  // a function's name
  int failure = 0;      // what it returns

  Machine() {
    const char* text = std::getenv("STANDIN_FAILURE");  // cuLaunchKernel=700
    const char* equals = text == nullptr ? nullptr : std::strchr(text, '=');
    if (equals == nullptr) return;
    failing.assign(text, equals);
    failure = std::atoi(equals + 1);
  }
  int result(const char* function) const { return failing == function ? failure : 0; }
};

const Machine& machine() {
  static const Machine instance;
  return instance;
}

thread_local void* current_context = nullptr;
char contexts[64], a_module, a_function;

struct Calls {
  int launches = 0, loaded = 0, unloaded = 0, pushed = 0, popped = 0, initialized = 0;
} calls;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define FAIL_IF_ASKED \
  if (const int result = machine().result(__func__)) return result

EXPORT int cuInit(unsigned) {
  ++calls.initialized;
  return machine().result("cuInit");
}
EXPORT int cuDriverGetVersion(int* version) {
  *version = machine().version;
  return 0;
}
EXPORT int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_OF_THE_STAND_IN";
  return 0;
}
EXPORT int cuGetErrorString(int, const char** text) {
  *text = "as the test asked for";
  return 0;
}
EXPORT int cuDeviceGetCount(int* count) {
  *count = machine().gpus;
  return machine().result("cuDeviceGetCount");
}
EXPORT int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
EXPORT int cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "Stand-in", size);
  return machine().result("cuDeviceGetName");
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:
      *value = 108;
      return 0;
    case 75:
      *value = machine().capability / 10;
      return 0;
    case 76:
      *value = machine().capability % 10;
      return 0;
    case 97:
      *value = machine().shared_bytes;
      return 0;
    default:
      return 1;
  }
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  FAIL_IF_ASKED;
  *context = &contexts[device];
  return 0;
}
EXPORT int cuCtxGetCurrent(void** context) {
  FAIL_IF_ASKED;
  *context = current_context;
  return 0;
}
EXPORT int cuCtxPushCurrent_v2(void* context) {
  FAIL_IF_ASKED;
  current_context = context;
  ++calls.pushed;
  return 0;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
  *context = current_context;
  current_context = nullptr;
  ++calls.popped;
  return 0;
}
EXPORT int cuModuleLoadData(void** module, const void* image) {
  FAIL_IF_ASKED;
  ++calls.loaded;
  *module = &a_module;
  return image == nullptr ? 1 : 0;
}
EXPORT int cuModuleUnload(void*) {
  ++calls.unloaded;
  return 0;
}
EXPORT int cuModuleGetFunction(void** function, void*, const char*) {
  FAIL_IF_ASKED;
  *function = &a_function;
  return 0;
}
EXPORT int cuFuncSetAttribute(void*, int, int) { return machine().result("cuFuncSetAttribute"); }
#ifndef OLD  // a driver that lacks one of the functions
EXPORT int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
#endif
EXPORT int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  FAIL_IF_ASKED;
  ++calls.launches;
  return 0;
}

EXPORT void standin_make_current(int device) { current_context = device < 0 ? nullptr : &contexts[device]; }
EXPORT void standin_calls(int* numbers) {
  const int counted[] = {calls.launches, calls.loaded, calls.unloaded, calls.pushed, calls.popped, calls.initialized};
  std::memcpy(numbers, counted, sizeof(counted));
}
