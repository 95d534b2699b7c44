// SPDX-License-Identifier: Apache-2.0
// Launches kernels through the NVIDIA driver, loaded on first use: building needs no toolkit, importing no driver.
//
// Images are loaded when a device first needs them, and kept. Nothing allocates device memory or synchronizes, so launches, even the first,
// may be captured into a graph. Every failure is a std::runtime_error that names the kernel, the device and a remedy.
#pragma once
#include <string>

#include "plan.h"

namespace fused_attention::cuda {

// Does not initialize CUDA; everything below does.
int driver_version();  // as the driver counts: 12040 supports CUDA 12.4; 0 without a driver
int device_count();    // 0 without a driver, never throws

// Why the kernels cannot run on a device (-1: on any), or an empty string.
std::string why_not(int device);

DeviceLimits device_limits(int device);
std::string device_name(int device);

// Whether the images have machine code for a GPU of this compute capability (times ten); otherwise the driver compiles their PTX.
bool has_machine_code(int compute_capability);

// On a stream of that device, in its primary context, which is made current during the call.
void launch(int device, void* stream, const Plan& plan);

}  // namespace fused_attention::cuda
