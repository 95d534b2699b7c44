// SPDX-License-Identifier: Apache-2.0
// Launches kernels through the NVIDIA driver, which is looked for when it is first needed: no toolkit to build, no driver to import.
//
// Images are loaded when a device first needs them and kept. Nothing is allocated on a device and nothing waits for it, so launches may be
// captured into a graph, the first one included. Every failure is a std::runtime_error that names the kernel, the device and a way out.
#pragma once
#include <string>

#include "plan.h"

namespace fused_attention::cuda {

// Asked without initializing CUDA; all that follows initializes it.
int driver_version();  // as the driver counts: 12040 supports CUDA 12.4; 0 without a driver
int device_count();    // 0 without a driver, never throws

// Why the kernels cannot run on a device (-1: on any), or an empty string.
std::string why_not(int device);

DeviceLimits device_limits(int device);
std::string device_name(int device);

// Whether the images hold machine code that a GPU of this compute capability (ten times) runs; otherwise the driver compiles their PTX.
bool has_machine_code(int compute_capability);

// On a stream of that device, in its primary context, which is made current for the call where it is not.
void launch(int device, void* stream, const Plan& plan);

}  // namespace fused_attention::cuda
