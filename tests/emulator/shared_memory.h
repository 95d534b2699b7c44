// The block's shared memory: range checks, which bytes an asynchronous copy is still filling, and every access by threads.
// Offsets count from the first byte; addresses in the shared state space start at SHARED_BASE, so that 0 is never valid.
#pragma once
#include <cstddef>
#include <cstdint>

#include "report.h"
#include "scheduler.h"

namespace emulator {

constexpr uint32_t SHARED_BASE = 1024;
constexpr size_t MAX_SHARED_BYTES = 227 << 10;
// What a read outside shared memory returns, after it was reported: NaNs in any 16-bit format.
extern const uint16_t OUT_OF_RANGE[8];

void begin_launch_shared_memory(size_t bytes);
void begin_block_shared_memory(Block&);  // fills it with 0xff: NaNs
uint8_t* shared_memory();                // of the running block
size_t shared_size();
bool shared_range_ok(uint32_t address, uint32_t bytes, const char* what, Location);

// An asynchronous copy holds its destination "in flight", filled with NaNs, from its issue until it is known to have landed.
void begin_flight(uint32_t offset, uint32_t bytes);
void end_flight(uint32_t offset, uint32_t bytes);
bool in_flight(uint32_t offset, uint32_t bytes);

// Called before every access by a thread; `data`: the bytes about to be written, when known.
void check_shared_read(const Thread&, uint32_t offset, uint32_t bytes, Location);
void check_shared_write(const Thread&, uint32_t offset, uint32_t bytes, Location, const void* data = nullptr);

}  // namespace emulator
