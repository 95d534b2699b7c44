#include "ptx_interpreter.h"

#include <cstring>
#include <deque>

#include "barriers.h"
#include "cp_async.h"
#include "global_memory.h"
#include "number_formats.h"
#include "mbarrier.h"
#include "ptx_memory.h"
#include "ptx_wgmma.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "tma.h"
#include "wgmma.h"

namespace emulator {
namespace {

const Module* module;
const Function* entry;
const uint8_t* kernel_parameters;

uint64_t special_value(Special special) {
  const Dim3 tid = current->thread_index, ntid = launch.block, ctaid = running->index, nctaid = launch.grid;
  const uint64_t values[] = {tid.x,   tid.y,    tid.z,    ntid.x,   ntid.y,        ntid.z,        ctaid.x, ctaid.y,
                             ctaid.z, nctaid.x, nctaid.y, nctaid.z, current->lane, current->warp, 0};
  return values[int(special)];
}

void push_frame(PtxThread& thread, const Function& function) {
  auto frame = std::make_unique<Frame>();
  frame->function = &function;
  frame->cells.assign(function.num_cells, 0);
  frame->memory = std::make_unique<uint8_t[]>(function.frame_bytes + 1);
  memset(frame->memory.get(), 0xff, function.frame_bytes);
  for (const CellValue& cell : function.cell_values) {
    uint64_t value = cell.value;
    if (cell.source == Source::special) value = special_value(Special(cell.value));
    if (cell.source == Source::kernel_parameter) value += uint64_t(kernel_parameters);
    if (cell.source == Source::frame_memory) value += uint64_t(frame->memory.get());
    if (cell.source == Source::dynamic_shared) value = SHARED_BASE + module->dynamic_shared_offset();
    frame->cells[cell.cell] = value;
  }
  thread.frames.push_back(std::move(frame));
}

// Arguments are copied from the caller's .param variables to the callee's; results back when it returns.
void enter_call(PtxThread& thread, const Instruction& call) {
  Frame& caller = *thread.frames.back();
  const Function& callee = module->functions[call.target];
  if (thread.flying) report("wgmma", call.where, "a function is called while wgmma is in flight");
  push_frame(thread, callee);
  for (size_t i = 0; i < callee.parameters.size() && i < call.operands[1].cells.size(); ++i)
    memcpy(thread.frames.back()->memory.get() + callee.parameters[i].offset,
           reinterpret_cast<void*>(caller.cells[call.operands[1].cells[i]]), callee.parameters[i].bytes);
}

void leave_call(PtxThread& thread) {
  const std::unique_ptr<Frame> callee = std::move(thread.frames.back());
  thread.frames.pop_back();
  Frame& caller = *thread.frames.back();
  const Instruction& call = caller.function->code[caller.next - 1];
  for (size_t i = 0; i < callee->function->results.size() && i < call.operands[0].cells.size(); ++i)
    memcpy(reinterpret_cast<void*>(caller.cells[call.operands[0].cells[i]]), callee->memory.get() + callee->function->results[i].offset,
           callee->function->results[i].bytes);
}

void execute_shuffle(const Instruction& i, uint64_t* cells) {
  const uint32_t lane = current->lane, b = uint32_t(cells[i.cell[2]]), c = uint32_t(cells[i.cell[3]]);
  const uint32_t segment = c >> 8 & 31, clamp = c & 31, last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  int source;
  bool valid;
  switch (i.variant) {
    case 0:
      source = int(lane ^ b), valid = source <= int(last);
      break;
    case 1:
      source = int(lane) - int(b), valid = source >= int(last);
      break;
    case 2:
      source = int(lane + b), valid = source <= int(last);
      break;
    default:
      source = int(first | (b & ~segment & 31)), valid = source <= int(last);
      break;
  }
  const uint32_t value = shuffle(uint32_t(cells[i.cell[4]]), uint32_t(cells[i.cell[1]]), valid ? uint32_t(source) : lane, i.where);
  cells[i.cell[0]] = value;
  if (i.operands[0].cells.size() > 1) cells[i.operands[0].cells[1]] = valid;
}

void execute_mma(const Instruction& i, uint64_t* cells) {
  uint32_t x[4][4] = {};
  for (int k = 1; k < 4; ++k)
    for (size_t r = 0; r < i.operands[k].cells.size() && r < 4; ++r) x[k][r] = uint32_t(cells[i.operands[k].cells[r]]);
  const MmaShape shape{i.variant, i.types[1] == Type::f16 ? Float16::f16 : Float16::bf16, i.types[0] == Type::f16};
  mma(shape, x[0], x[1], x[2], x[3], i.where);
  for (size_t r = 0; r < i.operands[0].cells.size(); ++r) cells[i.operands[0].cells[r]] = x[0][r];
}

// bar.sync a [, threads]; bar.red d, a [, threads], p
void execute_barrier(const Instruction& i, uint64_t* cells) {
  const auto value = [&](size_t k) { return k < i.operands.size() ? uint32_t(cells[i.operands[k].cells[0]]) : 0; };
  if (i.opcode == Opcode::barrier) {
    barrier_sync(value(0), i.operands.size() > 1 ? value(1) : WHOLE_BLOCK, i.where);
  } else if (i.opcode == Opcode::barrier_arrive) {
    barrier_arrive(value(0), value(1), i.where);
  } else {
    const bool counted = i.operands.size() == 4, predicate = (value(counted ? 3 : 2) & 1) != i.operands.back().negated;
    const BarrierVotes votes = barrier_sync(value(1), counted ? value(2) : WHOLE_BLOCK, i.where, predicate);
    cells[i.cell[0]] = i.variant == 0 ? votes.count : i.variant == 1 ? votes.all : votes.any;
  }
}

// Tensor maps lie among the kernel's parameters (__grid_constant__) or in global memory.
bool is_tensor_map(const PtxThread& thread, const Instruction& i, uint64_t address) {
  const uint64_t offset = address - uint64_t(thread.kernel_parameters);
  const bool is_parameter = offset < thread.kernel_parameter_bytes && offset + sizeof(TensorMap) <= thread.kernel_parameter_bytes;
  return is_parameter || global_range_ok(reinterpret_cast<void*>(address), sizeof(TensorMap), "tensor map", i.where);
}

// Everything that concerns other threads or asynchronous hardware.
void execute_collective(PtxThread& thread, const Instruction& i, uint64_t* cells) {
  const auto value = [&](int k) { return cells[i.cell[k]]; };
  const auto word = [&](int k) { return uint32_t(value(k)); };
  const auto address = [&](int k) { return value(k) + uint64_t(i.operands[k].offset); };
  const auto set = [&](uint64_t result) { cells[i.cell[0]] = result; };
  const auto has = [&](size_t k) { return k < i.operands.size(); };
  const auto coordinates = [&](int k) {
    static int c[5];
    for (size_t j = 0; j < i.operands[k].coordinates.size() && j < 5; ++j) c[j] = int(cells[i.operands[k].coordinates[j]]);
    return c;
  };
  uint32_t matrix[4];
  switch (i.opcode) {
    case Opcode::barrier:
    case Opcode::barrier_arrive:
    case Opcode::barrier_reduce:
      return execute_barrier(i, cells);
    case Opcode::syncwarp:
      return syncwarp(word(0), i.where);
    case Opcode::shuffle:
      return execute_shuffle(i, cells);
    case Opcode::vote: {
      const uint32_t mask = word(2), votes = ballot(mask, (value(1) & 1) != i.operands[1].negated, i.where);
      return set(i.variant == 0 ? votes : i.variant == 1 ? votes != 0 : votes == mask);
    }
    case Opcode::redux:
      return set(reduce(word(2), word(1), Reduction(i.variant), is_signed(i.type), i.where));
    case Opcode::elect: {
      const uint32_t leader = elect(word(1), i.where);
      set(leader);
      cells[i.operands[0].cells[1]] = leader == current->lane;
      return;
    }
    case Opcode::ldmatrix:
      ldmatrix(matrix, i.variant, i.flag, uint32_t(address(1)), i.where);
      for (int r = 0; r < i.variant; ++r) cells[i.operands[0].cells[r]] = matrix[r];
      return;
    case Opcode::stmatrix:
      for (int r = 0; r < i.variant; ++r) matrix[r] = uint32_t(cells[i.operands[1].cells[r]]);
      return stmatrix(matrix, i.variant, i.flag, uint32_t(address(0)), i.where);
    case Opcode::movmatrix:
      return set(movmatrix_transposed(word(1), i.where));
    case Opcode::mma:
      return execute_mma(i, cells);
    case Opcode::cp_async:
      return cp_async(uint32_t(address(0)), reinterpret_cast<void*>(address(1)), word(2), has(3) ? word(3) : word(2), i.where);
    case Opcode::cp_async_commit:
      return cp_async_commit(i.where);
    case Opcode::cp_async_wait:
      return cp_async_wait(word(0), i.where);
    case Opcode::cp_async_wait_all:
      return cp_async_commit(i.where), cp_async_wait(0, i.where);
    case Opcode::cp_async_mbarrier_arrive:
      return mbarrier_arrive_after_cp_async(uint32_t(address(0)), i.flag, i.where);
    case Opcode::mbarrier_init:
      return mbarrier_init(uint32_t(address(0)), word(1), i.where);
    case Opcode::mbarrier_inval:
      return mbarrier_invalidate(uint32_t(address(0)), i.where);
    case Opcode::mbarrier_arrive: {  // [state,] [address] [, count or bytes]
      const int k = i.operands[0].is_address ? 0 : 1;
      const uint32_t argument = has(k + 1) ? word(k + 1) : 1;
      return mbarrier_arrive(uint32_t(address(k)), i.flag ? 1 : argument, i.flag ? argument : 0, i.where);
    }
    case Opcode::mbarrier_expect_tx:
      return mbarrier_expect_bytes(uint32_t(address(0)), word(1), i.where);
    // try_wait may suspend the thread, and here it does until the phase is over: a deadlock is then seen as one.
    case Opcode::mbarrier_try_wait:
      return set(mbarrier_try_wait(uint32_t(address(1)), word(2), true, i.where));
    case Opcode::mbarrier_test_wait:
      return set(mbarrier_try_wait(uint32_t(address(1)), word(2), false, i.where));
    case Opcode::fence:
      return i.gpu_scope ? fence_gpu_scope(i.where) : maybe_preempt();
    case Opcode::fence_proxy_async:
      return fence_proxy_async(i.variant & FENCES_SHARED, i.variant & FENCES_GLOBAL, i.where);
    case Opcode::fence_mbarrier_init:
      return fence_mbarrier_init(i.where);
    case Opcode::tma_load:
      if (!is_tensor_map(thread, i, address(1))) return;
      return tma_load(uint32_t(address(0)), reinterpret_cast<TensorMap*>(address(1)), uint32_t(address(2)),
                      int(i.operands[1].coordinates.size()), coordinates(1), i.where);
    case Opcode::tma_store:
      if (!is_tensor_map(thread, i, address(0))) return;
      return tma_store(reinterpret_cast<TensorMap*>(address(0)), uint32_t(address(1)), int(i.operands[0].coordinates.size()),
                       coordinates(0), StoreKind(i.variant), i.where);
    case Opcode::bulk_load:
      return tma_load_bytes(uint32_t(address(0)), reinterpret_cast<void*>(address(1)), word(2), uint32_t(address(3)), i.where);
    case Opcode::bulk_store:
      return tma_store_bytes(reinterpret_cast<void*>(address(0)), uint32_t(address(1)), word(2), StoreKind(i.variant), i.where);
    case Opcode::bulk_commit:
      return tma_store_commit(i.where);
    case Opcode::bulk_wait:
      return tma_store_wait(word(0), i.flag, i.where);
    case Opcode::wgmma_fence:
      return wgmma_fence(i.where);
    case Opcode::wgmma_commit:
      return wgmma_commit(i.where);
    case Opcode::wgmma_wait:
      return wait_wgmma(thread, i, cells);
    case Opcode::wgmma:
      return start_wgmma(thread, i, cells);
    case Opcode::setmaxnreg:
      return setmaxnreg(int(word(0)), i.flag, i.where);
    default:
      return;
  }
}

}  // namespace

struct PtxThreads {
  std::vector<PtxThread> of_thread;
};

void begin_ptx_launch(const Module& launched, const Function& function, const uint8_t* parameters) {
  module = &launched;
  entry = &function;
  kernel_parameters = parameters;
}

void begin_ptx_block(Block& block) {
  block.ptx = std::make_shared<PtxThreads>();
  block.ptx->of_thread = std::vector<PtxThread>(launch.num_threads);
}

void run_ptx_thread() {
  PtxThread& thread = running->ptx->of_thread[current->index];
  thread.kernel_parameters = kernel_parameters;
  thread.kernel_parameter_bytes = entry->parameter_bytes;
  push_frame(thread, *entry);
  Frame* frame = thread.frames.back().get();
  uint64_t* cells = frame->cells.data();
  const Instruction* code = frame->function->code.data();
  const auto continue_frame = [&] {
    frame = thread.frames.back().get();
    cells = frame->cells.data();
    code = frame->function->code.data();
  };
  const uint64_t limit = launch.schedule.max_instructions;
  for (uint64_t executed = 0;; ++executed) {
    const Instruction& i = code[frame->next++];
    if (i.guard >= 0 && bool(cells[i.guard] & 1) == i.guard_negated) continue;
    if (thread.flying && i.opcode != Opcode::mov && i.opcode != Opcode::wgmma) check_reads_no_token(thread, i, cells);
    switch (i.opcode) {
      case Opcode::mov:
        if (thread.flying) note_copied_token(thread, i, cells[i.cell[1]]);
        execute_arithmetic(i, cells);
        break;
      case Opcode::branch:
        if (limit && executed > limit) {
          report("livelock", i.where, "the thread has executed %llu instructions", (unsigned long long)executed);
          abandon_launch();
        }
        frame->next = i.target;
        break;
      case Opcode::branch_table: {
        const uint64_t index = uint32_t(cells[i.cell[0]]);
        if (index >= i.targets.size()) {
          report("branch", i.where, "brx.idx with index %llu of a table of %zu", (unsigned long long)index, i.targets.size());
          abandon_launch();
        }
        frame->next = i.targets[index];
        break;
      }
      case Opcode::call:
        enter_call(thread, i);
        continue_frame();
        break;
      case Opcode::ret:
        if (thread.frames.size() > 1) {
          leave_call(thread);
          continue_frame();
          break;
        }
        [[fallthrough]];
      case Opcode::exit:
        counts.instructions += executed;
        thread.frames.clear();
        return;
      case Opcode::trap:
        report("trap", i.where, "the kernel stopped itself");
        abandon_launch();
      case Opcode::nop:
        break;
      case Opcode::pause:
        yield_to_others();
        break;
      case Opcode::load:
      case Opcode::store:
      case Opcode::atomic:
      case Opcode::cvta:
      case Opcode::isspacep:
        execute_memory(thread, i, cells);
        break;
      default:
        if (i.opcode <= Opcode::cvt)
          execute_arithmetic(i, cells);
        else
          execute_collective(thread, i, cells);
    }
  }
}

}  // namespace emulator
