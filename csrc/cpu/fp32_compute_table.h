// SPDX-License-Identifier: Apache-2.0
// The table of an instruction set that computes every dtype in float32.
#pragma once
#include "backward.h"
#include "forward.h"
#include "forward_with_weights.h"
#include "kernel_table.h"
#include "linear.h"
#include "weights.h"

namespace fused_attention::cpu::FA_ISA {

constexpr KernelTable fp32_compute_table(const char* name) {
  return {name,
          {{plan_forward<float>, run_forward<float>},
           {plan_forward<bfloat16_t>, run_forward<bfloat16_t>},
           {plan_forward<float16_t>, run_forward<float16_t>}},
          {{plan_backward<float>, run_backward<float>},
           {plan_backward<bfloat16_t>, run_backward<bfloat16_t>},
           {plan_backward<float16_t>, run_backward<float16_t>}},
          {{plan_weights<float>, run_weights<float>},
           {plan_weights<bfloat16_t>, run_weights<bfloat16_t>},
           {plan_weights<float16_t>, run_weights<float16_t>}},
          {plan_forward_with_weights, run_forward_with_weights},
          {{plan_quantized_forward<int8_number_t>, run_quantized_forward<int8_number_t>},
           {plan_quantized_forward<float8_e4m3_t>, run_quantized_forward<float8_e4m3_t>},
           {plan_quantized_forward<float8_e5m2_t>, run_quantized_forward<float8_e5m2_t>}},
          run_linear};
}

}  // namespace fused_attention::cpu::FA_ISA
