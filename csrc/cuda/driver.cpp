// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace fused_attention::cuda {
namespace {

// The driver's types and constants, which are part of its ABI.
using Result = int;
using Ordinal = int;
struct ContextHandle;
struct ModuleHandle;
struct FunctionHandle;
constexpr Result kSuccess = 0;
constexpr int kAttributeMultiprocessors = 16, kAttributeMajor = 75, kAttributeMinor = 76, kAttributeSharedBytesOptin = 97;
constexpr int kFunctionAttributeDynamicSharedBytes = 8;
constexpr int kCaptureModeRelaxed = 2;
constexpr uint32_t kSharedBytesWithoutAsking = 48 * 1024;

// Every driver since CUDA 10.1 has these.
#define DRIVER_FUNCTIONS(F)                                              \
  F(cuInit, (unsigned))                                                  \
  F(cuDriverGetVersion, (int*))                                          \
  F(cuGetErrorName, (Result, const char**))                              \
  F(cuGetErrorString, (Result, const char**))                            \
  F(cuDeviceGetCount, (int*))                                            \
  F(cuDeviceGet, (Ordinal*, int))                                        \
  F(cuDeviceGetName, (char*, int, Ordinal))                              \
  F(cuDeviceGetAttribute, (int*, int, Ordinal))                          \
  F(cuDevicePrimaryCtxRetain, (ContextHandle**, Ordinal))                \
  F(cuCtxGetCurrent, (ContextHandle**))                                  \
  F(cuCtxPushCurrent_v2, (ContextHandle*))                               \
  F(cuCtxPopCurrent_v2, (ContextHandle**))                               \
  F(cuModuleLoadData, (ModuleHandle**, const void*))                     \
  F(cuModuleUnload, (ModuleHandle*))                                     \
  F(cuModuleGetFunction, (FunctionHandle**, ModuleHandle*, const char*)) \
  F(cuFuncSetAttribute, (FunctionHandle*, int, int))                     \
  F(cuThreadExchangeStreamCaptureMode, (int*))                           \
  F(cuLaunchKernel, (FunctionHandle*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**))

struct Functions {
#define DECLARE(name, parameters) Result(*name) parameters = nullptr;
  DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
};

struct Device {
  Ordinal ordinal = 0;
  std::string name;
  DeviceLimits limits;
  std::mutex loading;                                         // held while the members below are filled in
  std::atomic<ContextHandle*> context{nullptr};               // the primary one, which torch uses too
  std::unique_ptr<std::atomic<FunctionHandle*>[]> functions;  // of kImages; null until first needed
};

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// Found without initializing CUDA: once initialized, a forked child could not use it.
struct Library {
  Functions functions;
  std::string failure;  // why there is none; empty when it works
  int version = 0;

  Library() {
    void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      failure = std::string("no NVIDIA driver: ") + dlerror();
      return;
    }
    const char* missing = nullptr;
#define FIND(name, parameters)                                                       \
  functions.name = reinterpret_cast<decltype(functions.name)>(dlsym(handle, #name)); \
  if (functions.name == nullptr) missing = #name;
    DRIVER_FUNCTIONS(FIND)
#undef FIND
    if (functions.cuDriverGetVersion != nullptr) functions.cuDriverGetVersion(&version);
    if (missing != nullptr) {
      failure = "the NVIDIA driver is too old: it supports CUDA " + version_text(version) + " and has no " + missing +
                ", the kernels were compiled by CUDA " + version_text(kToolkitVersion) + ": update the driver";
    }
  }
};

const Library& library() {
  static const Library* const instance = new Library;
  return *instance;
}

struct Driver {
  const Functions& functions = library().functions;
  const int version = library().version;
  std::string failure = library().failure;  // why there is none, or why it does not work
  int num_devices = 0;
  std::unique_ptr<Device[]> devices;

  Driver() {
    if (failure.empty()) find_devices();
  }

  // CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)
  std::string error_text(Result result) const {
    const char *name = nullptr, *text = nullptr;
    functions.cuGetErrorName(result, &name);
    functions.cuGetErrorString(result, &text);
    return (name != nullptr ? std::string(name) : "error " + std::to_string(result)) +
           (text != nullptr ? " (" + std::string(text) + ")" : "");
  }

 private:
  void find_devices() {
    if (const Result result = functions.cuInit(0)) {
      failure = "the NVIDIA driver does not start: " + error_text(result);
      return;
    }
    int count = 0;
    if (const Result result = functions.cuDeviceGetCount(&count)) {
      failure = "the NVIDIA driver cannot count GPUs: " + error_text(result);
      return;
    }
    devices = std::make_unique<Device[]>(count);
    for (int i = 0; i < count; ++i) {
      if (const Result result = describe(devices[i], i)) {
        failure = "the NVIDIA driver cannot describe GPU " + std::to_string(i) + ": " + error_text(result);
        return;
      }
    }
    num_devices = count;
  }

  Result describe(Device& device, int index) {
    char name[256] = "";
    int major = 0, minor = 0;
    if (const Result result = functions.cuDeviceGet(&device.ordinal, index)) return result;
    if (const Result result = functions.cuDeviceGetName(name, sizeof(name) - 1, device.ordinal)) return result;
    const std::pair<int, int*> attributes[] = {{kAttributeMajor, &major},
                                               {kAttributeMinor, &minor},
                                               {kAttributeMultiprocessors, &device.limits.multiprocessors},
                                               {kAttributeSharedBytesOptin, &device.limits.shared_bytes}};
    for (const auto& [attribute, value] : attributes) {
      if (const Result result = functions.cuDeviceGetAttribute(value, attribute, device.ordinal)) return result;
    }
    device.name = name;
    device.limits.compute_capability = 10 * major + minor;
    device.functions = std::make_unique<std::atomic<FunctionHandle*>[]>(kNumImages);
    return kSuccess;
  }
};

Driver& driver() {
  static Driver* const instance = new Driver;  // never destroyed: the driver may be gone by the time destructors run
  return *instance;
}

Device& checked_device(int index) {
  Driver& gpu = driver();
  if (!gpu.failure.empty()) throw std::runtime_error(gpu.failure);
  if (index < 0 || index >= gpu.num_devices) {
    throw std::runtime_error("there is no GPU " + std::to_string(index) + ": the driver has " + std::to_string(gpu.num_devices));
  }
  return gpu.devices[index];
}

std::string device_text(const Device& device) {
  const int capability = device.limits.compute_capability;
  return "GPU " + std::to_string(device.ordinal) + " (" + device.name + ", compute capability " + std::to_string(capability / 10) + "." +
         std::to_string(capability % 10) + ")";
}

std::string versions_text() {
  return "the driver supports CUDA " + version_text(driver().version) + ", the kernels were compiled by CUDA " +
         version_text(kToolkitVersion);
}

std::string way_out(Result result) {
  switch (result) {
    case 2:  // OUT_OF_MEMORY
      return "the GPU has no memory left for the kernel itself: free some, or use another GPU";
    case 3:  // NOT_INITIALIZED
    case 4:  // DEINITIALIZED
      return "a forked process cannot use its parent's GPU: start it with multiprocessing's spawn method";
    case 209:  // NO_BINARY_FOR_GPU
      return "this build has no code for this GPU: rebuild with FUSED_ATTENTION_CUDA_ARCHS naming its architecture, or use "
             "backend='triton'";
    case 218:  // INVALID_PTX
    case 221:  // JIT_COMPILER_NOT_FOUND
    case 222:  // UNSUPPORTED_PTX_VERSION
    case 223:  // JIT_COMPILATION_DISABLED
      return versions_text() + ", whose PTX is all that fits this GPU: update the driver, or use backend='triton'";
    case 1:    // INVALID_VALUE
    case 701:  // LAUNCH_OUT_OF_RESOURCES
      return "this GPU has too few registers or too little shared memory for the kernel: use backend='triton'";
    case 900:  // STREAM_CAPTURE_UNSUPPORTED
    case 901:  // STREAM_CAPTURE_INVALIDATED
    case 906:  // STREAM_CAPTURE_IMPLICIT
      return "the stream is being captured into a graph: run the call once before the capture";
    case 700:  // ILLEGAL_ADDRESS
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case 719:  // LAUNCH_FAILED
    case 702:  // LAUNCH_TIMEOUT
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
      return "a kernel that ran before, of any library, failed: CUDA_LAUNCH_BLOCKING=1 shows which; this process cannot use the GPU any "
             "more";
    default:
      return versions_text();
  }
}

void check(Result result, const char* what, const char* kernel, const Device& device) {
  if (result == kSuccess) return;
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + " " + what + " on " + device_text(device) + ": " +
                           driver().error_text(result) + "; " + way_out(result));
}

// Loading a module is not stream work, but during a capture the driver refuses it unless the thread opts in.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().functions.cuThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { driver().functions.cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = kCaptureModeRelaxed;  // the mode to restore, after the first exchange
};

// Makes the device's primary context current for its lifetime.
class CurrentContext {
 public:
  CurrentContext(Device& device, const char* kernel) {
    const Functions& cuda = driver().functions;
    ContextHandle* context = device.context.load(std::memory_order_acquire);
    if (context == nullptr) {
      const std::lock_guard<std::mutex> lock(device.loading);
      context = device.context.load(std::memory_order_acquire);
      if (context == nullptr) {
        const RelaxedCapture relaxed;
        check(cuda.cuDevicePrimaryCtxRetain(&context, device.ordinal), "has no context", kernel, device);
        device.context.store(context, std::memory_order_release);
      }
    }
    ContextHandle* current = nullptr;
    check(cuda.cuCtxGetCurrent(&current), "could not be launched", kernel, device);
    if (current == context) return;
    check(cuda.cuCtxPushCurrent_v2(context), "could not be launched", kernel, device);
    pushed_ = true;
  }
  ~CurrentContext() {
    ContextHandle* ours = nullptr;
    if (pushed_) driver().functions.cuCtxPopCurrent_v2(&ours);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

// In the device's context.
FunctionHandle* load(Device& device, const Image& image) {
  const Functions& cuda = driver().functions;
  const RelaxedCapture relaxed;
  ModuleHandle* module = nullptr;
  FunctionHandle* function = nullptr;
  check(cuda.cuModuleLoadData(&module, image.begin), "could not be loaded", image.name, device);
  try {
    check(cuda.cuModuleGetFunction(&function, module, image.name), "is not in its image", image.name, device);
    if (static_cast<uint32_t>(image.shared_bytes) > kSharedBytesWithoutAsking) {
      const std::string what = "cannot have its " + std::to_string(image.shared_bytes) + " bytes of shared memory (at most " +
                               std::to_string(device.limits.shared_bytes) + ")";
      check(cuda.cuFuncSetAttribute(function, kFunctionAttributeDynamicSharedBytes, image.shared_bytes), what.c_str(), image.name, device);
    }
  } catch (...) {
    cuda.cuModuleUnload(module);
    throw;
  }
  return function;
}

FunctionHandle* loaded_function(Device& device, const Image& image) {
  std::atomic<FunctionHandle*>& slot = device.functions[&image - kImages];
  FunctionHandle* function = slot.load(std::memory_order_acquire);
  if (function != nullptr) return function;
  const std::lock_guard<std::mutex> lock(device.loading);
  function = slot.load(std::memory_order_acquire);
  if (function == nullptr) {
    function = load(device, image);
    slot.store(function, std::memory_order_release);
  }
  return function;
}

// Machine code needs a driver of the toolkit's major version; PTX needs one at least as new as the toolkit.
std::string why_not_on(const Device& device) {
  const int capability = device.limits.compute_capability;
  bool has_code = false;
  for (int i = 0; i < kNumImages; ++i) has_code |= runs_on(kImages[i].family, capability);
  if (!has_code) return "no image for " + device_text(device) + ": the kernels need compute capability 8.0";
  if (!has_machine_code(capability) && driver().version < kToolkitVersion) {
    return "the NVIDIA driver is too old for " + device_text(device) + ", for which this build has no machine code: " + versions_text() +
           ": update the driver, or rebuild with FUSED_ATTENTION_CUDA_ARCHS=" + std::to_string(capability);
  }
  return "";
}

}  // namespace

int driver_version() { return library().version; }
int device_count() { return driver().num_devices; }

std::string why_not(int device) {
  if (kWhyNoImages != nullptr) return kWhyNoImages;
  const Driver& gpu = driver();
  if (!gpu.failure.empty()) return gpu.failure;
  if (gpu.version / 1000 < kToolkitVersion / 1000) {
    return "the NVIDIA driver is too old: " + versions_text() + ": update the driver, or reinstall: the build picks a toolkit that fits it";
  }
  if (gpu.num_devices == 0) return "the NVIDIA driver sees no GPU";
  if (device >= gpu.num_devices) return "there is no GPU " + std::to_string(device) + ": the driver has " + std::to_string(gpu.num_devices);
  if (device >= 0) return why_not_on(gpu.devices[device]);
  for (int i = 0; i < gpu.num_devices; ++i) {
    if (why_not_on(gpu.devices[i]).empty()) return "";
  }
  return why_not_on(gpu.devices[0]);
}

DeviceLimits device_limits(int device) { return checked_device(device).limits; }
std::string device_name(int device) { return checked_device(device).name; }

bool has_machine_code(int compute_capability) {
  for (int i = 0; i < kNumMachineCode; ++i) {
    const MachineCode& code = kMachineCode[i];
    if (code.compute_capability == compute_capability) return true;
    const bool same_major = code.compute_capability / 10 == compute_capability / 10;
    if (code.suffix != 'a' && same_major && code.compute_capability < compute_capability) return true;
  }
  return false;
}

void launch(int device_index, void* stream, const Plan& plan) {
  if (plan.launches.empty()) return;
  Device& device = checked_device(device_index);
  const CurrentContext current(device, plan.launches.front().image->name);
  for (const Launch& launch : plan.launches) {
    FunctionHandle* function = loaded_function(device, *launch.image);
    void* parameters[] = {const_cast<unsigned char*>(launch.arguments)};
    check(driver().functions.cuLaunchKernel(function, launch.blocks, 1, 1, launch.threads, 1, 1, launch.shared_bytes, stream, parameters,
                                            nullptr),
          "could not be launched", launch.image->name, device);
  }
}

}  // namespace fused_attention::cuda
