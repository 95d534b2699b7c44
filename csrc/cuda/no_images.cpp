// SPDX-License-Identifier: Apache-2.0
// The table of images of a build without CUDA.
#include "images.h"

namespace fused_attention::cuda {

const Image kImages[] = {{}};
const int kNumImages = 0;
const int kToolkitVersion = 0;
const char* const kWhyNoImages =
    "the CUDA kernels are not built: reinstall with FUSED_ATTENTION_CUDA=1, which needs no toolkit on this machine";

}  // namespace fused_attention::cuda
