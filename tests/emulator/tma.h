// TMA: copies of boxes of a tensor (tiled mode) and of plain runs of bytes between global and shared memory.
// Loads complete on an mbarrier, stores and reductions on the issuing thread's bulk groups.
#pragma once
#include <cstdint>

#include "mbarrier.h"
#include "report.h"

namespace emulator {

// Stands in for CUtensorMap: same size and alignment, filled by the same arguments as cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
  uint64_t base;
  uint64_t dim[5], stride[5];  // innermost first; strides in bytes, stride[0] is the element
  uint32_t box[5];
  uint8_t rank, element_bytes, swizzle /* bytes: 0, 32, 64, 128 */, unused;
  uint32_t magic;
};
static_assert(sizeof(TensorMap) == 128);

// nullptr, or which rule of the encoder the arguments break.
const char* encode_tensor_map(TensorMap*, uint32_t element_bytes, uint32_t rank, uint64_t base, const uint64_t* dim, const uint64_t* stride,
                              const uint32_t* box, uint32_t swizzle);
// Where TMA and wgmma put the 16-byte chunk of this address: its place within the row of `swizzle` bytes is xored with the row.
uint32_t swizzled(uint32_t address, uint32_t swizzle);

enum class StoreKind : uint8_t { copy, add_f32, add_f16, add_bf16, add_32 /* integers */ };

void tma_load(uint32_t destination, const TensorMap*, uint32_t mbarrier, int rank, const int* coordinates, Location);
void tma_load_bytes(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier, Location);
void tma_store(const TensorMap*, uint32_t source, int rank, const int* coordinates, StoreKind, Location);
void tma_store_bytes(void* destination, uint32_t source, uint32_t bytes, StoreKind, Location);
void tma_store_commit(Location);
// `read`: only until shared memory has been read, when what is written may still be on its way to global memory.
void tma_store_wait(uint32_t groups_left, bool read, Location);

// Lands one load in flight; false if there is none. The scheduler calls it when nobody else can run.
bool deliver_tma_load();
// Called when a phase completes: a load issued in it must not be in flight.
void check_no_load_pending(const MBarrier&);

// Writes what nobody waited for, with the end of the launch.
void land_late_stores();

void begin_launch_tma();
void begin_block_tma(Block&);
void check_tma_stores_at_exit();
void check_tma_loads_at_end();

}  // namespace emulator
