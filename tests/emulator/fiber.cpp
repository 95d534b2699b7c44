#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifndef __x86_64__
#error "the emulator switches fibers with x86-64 assembly"
#endif

// System V x86-64: save the callee-saved registers on the old stack, load them from the new one. Ending with `ret` rather than a
// jump keeps the return predictor balanced, since all fibers sit in the same chain of calls.
extern "C" void emulator_switch_stack(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack,.-emulator_switch_stack
)");

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t GUARD_BYTES = 4096;  // below each stack, not accessible: an overflow traps
char* stacks;
size_t num_stacks;

}  // namespace

void switch_fiber(Fiber& from, const Fiber& to) { emulator_switch_stack(&from.stack_pointer, to.stack_pointer); }

void reserve_fiber_stacks(size_t count) {
  if (count <= num_stacks) return;
  const size_t pitch = STACK_BYTES + GUARD_BYTES;
  if (stacks) munmap(stacks, pitch * num_stacks);
  void* memory = mmap(nullptr, pitch * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks = static_cast<char*>(memory);
  num_stacks = count;
  for (size_t i = 0; i < count; ++i)
    if (mprotect(stacks + pitch * i, GUARD_BYTES, PROT_NONE)) throw std::bad_alloc();
}

Fiber new_fiber(size_t index, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stacks + (STACK_BYTES + GUARD_BYTES) * (index + 1));
  *--top = nullptr;  // keeps the stack 16-byte aligned at entry
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the callee-saved registers
  return {top};
}

}  // namespace emulator
