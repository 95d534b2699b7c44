// SPDX-License-Identifier: Apache-2.0
// The compiled kernels that this build of the extension contains. The table itself is generated from instances/manifest.py; it is empty in
// a build without CUDA.
#pragma once
#include "forward_arguments.h"

namespace fused_attention::cuda {

// backward and single_tile_backward compute all gradients, backward_key those of key and of value, backward_dkey and backward_dvalue one of
// the two; mask_gradient that of a float mask that batch elements or heads share. helper: the mask pre-pass, combine, backward_delta and
// backward_dquery, found by name.
enum class Pass : int {
  forward,
  decode,
  backward,
  backward_query,
  backward_key,
  backward_dkey,
  backward_dvalue,
  mask_gradient,
  single_tile_forward,
  single_tile_backward,
  helper
};

struct Image {
  const char* name;  // of the instance and of its entry point
  int family;        // of kernels: ten times a compute capability, see runs_on
  Pass pass;
  int head_dim_qk, head_dim_v;
  Dtype dtype;
  FeatureClass feature_class;
  bool dropout;
  int block_m, block_n, num_threads, shared_bytes;  // a block's rows and keys, its threads and its dynamic shared memory
  const unsigned char *begin, *end;                 // a fatbin: machine code and PTX
};

// Whether the kernels of a family run on a GPU. Those of 80 are PTX for compute capability 8.0, which every newer GPU runs; any other
// family uses instructions that later GPUs do not have, and runs only on its own compute capability.
constexpr int kPortableFamily = 80;
constexpr bool runs_on(int family, int compute_capability) {
  return family == kPortableFamily ? compute_capability >= family : compute_capability == family;
}

// An architecture that every image has machine code for. {90, 'a'} is sm_90a, which runs only on 9.0; {103, 'f'} is sm_103f, which runs on
// its family: from 10.3 on within the same major version, as plain code does.
struct MachineCode {
  int compute_capability;  // ten times
  char suffix;             // 0, 'a' or 'f'
};

extern const Image kImages[];
extern const int kNumImages;
extern const MachineCode kMachineCode[];
extern const int kNumMachineCode;
extern const int kToolkitVersion;       // that compiled them, as the driver counts: 13000 is CUDA 13.0
extern const char* const kBuilt;        // what compiled them, for which GPUs; empty in a build without CUDA
extern const char* const kWhyNoImages;  // null in a build with CUDA; otherwise why there are none, and how to get them

}  // namespace fused_attention::cuda
