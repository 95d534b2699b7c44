// wgmma as the interpreter sees it: what the registers of an accumulator hold while it is in flight.
#pragma once
#include <cstdint>

#include "ptx_memory.h"
#include "ptx_program.h"

namespace emulator {

void start_wgmma(PtxThread&, const Instruction&, uint64_t* cells);
void wait_wgmma(PtxThread&, const Instruction&, uint64_t* cells);
// For every instruction while an accumulator is in flight: one that is no copy must not read its registers.
void check_reads_no_token(const PtxThread&, const Instruction&, const uint64_t* cells);
void note_copied_token(PtxThread&, const Instruction&, uint64_t value);

}  // namespace emulator
