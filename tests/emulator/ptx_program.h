// A PTX module, parsed: what the interpreter executes.
//
// Every scalar that an instruction names - a register, a number, a special register, the address of a variable - is a 64-bit cell
// of the running function's frame, so that operands are plain indices. Cells that are not registers are filled when the frame is made.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "other_blocks.h"
#include "report.h"

namespace emulator {

struct PtxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t { none, pred, b8, u8, s8, b16, u16, s16, b32, u32, s32, b64, u64, s64, f16, bf16, f32, f64, f16x2, bf16x2 };
Type parse_type(const std::string& name);  // without the dot; none if it is not a type
uint32_t size_of(Type);
inline bool is_signed(Type type) { return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64; }

enum class Space : uint8_t { generic, global, shared, param, local, constant };

// clang-format off
enum class Opcode : uint8_t {
  // ptx_arithmetic.cpp
  mov, add, sub, mul, mul_wide, mul_hi, mad, mad_wide, mad_hi, fma, div, rem, min, max, neg, abs, copysign, ex2, lg2, rcp, sqrt, rsqrt,
  tanh, sin, cos, and_, or_, xor_, not_, shl, shr, shf, bfi, bfe, bfind, brev, popc, clz, prmt, lop3, setp, selp, cvt,
  // ptx_interpreter.cpp
  branch, branch_table, call, ret, exit, trap, nop, pause, cvta, isspacep, load, store, atomic,
  barrier, barrier_arrive, barrier_reduce, syncwarp, shuffle, vote, redux, elect, ldmatrix, stmatrix, movmatrix, mma,
  cp_async, cp_async_commit, cp_async_wait, cp_async_wait_all, cp_async_mbarrier_arrive,
  mbarrier_init, mbarrier_inval, mbarrier_arrive, mbarrier_expect_tx, mbarrier_try_wait, mbarrier_test_wait,
  fence, fence_proxy_async, fence_mbarrier_init, tma_load, tma_store, bulk_load, bulk_store, bulk_commit, bulk_wait,
  wgmma_fence, wgmma_commit, wgmma_wait, wgmma, setmaxnreg,
};
// clang-format on

// Unordered comparisons (equ, ltu, ...) are true when an operand is NaN.
enum class Comparison : uint8_t { eq, ne, lt, le, gt, ge, num, nan };
enum class Rounding : uint8_t { none, zero, nearest, down, up };  // to an integer: rzi, rni, rmi, rpi
enum class Combination : uint8_t { none, and_, or_, xor_ };       // of setp's result with a predicate
enum class AtomicKind : uint8_t { add, min, max, exch, cas, and_, or_, xor_, inc, dec };

constexpr int FENCES_SHARED = 1, FENCES_GLOBAL = 2;  // variants of fence_proxy_async
constexpr uint32_t SINK = 0;                         // the cell of `_`, written and never read

struct Operand {
  std::vector<uint32_t> cells;        // one, or those of a vector {a, b, c, d} or a pair p|q
  std::vector<uint32_t> coordinates;  // of [tensor map, {x, y, z}]
  int64_t offset = 0;                 // of [address + offset]
  bool is_address = false, negated = false;
};

struct Instruction {
  Opcode opcode = Opcode::nop;
  Type type = Type::none, type2 = Type::none;  // result and source, where they differ
  Space space = Space::generic;
  Comparison comparison = Comparison::eq;
  Rounding rounding = Rounding::none;  // to an integer
  int float_rounding = 0;              // a mode of fesetround(); 0: to nearest
  Combination combination = Combination::none;
  AtomicKind atomic = AtomicKind::add;
  Order order = Order::weak;  // of a load, a store, an atomic
  bool gpu_scope = false;     // of the order: the whole GPU, or more
  bool unordered = false, flush = false, saturate = false, nan_wins = false, relu = false;
  bool flag = false;    // depends on the opcode: .trans, .to, .inc, .left, ...
  uint8_t vector = 1;   // elements of a load or store
  int32_t variant = 0;  // depends on the opcode: a shape, a mode
  int32_t target = -1;  // of a branch: instruction; of a call: function
  int32_t guard = -1;   // cell of @p
  bool guard_negated = false;
  Location where = 0;
  uint32_t cell[8] = {};  // the first cell of each operand
  std::vector<Operand> operands;
  std::vector<Type> types;       // all of them, in order
  std::vector<int32_t> targets;  // of a branch by table
  std::string name;              // of a label, a table of labels or a function, until it is resolved
  int scope = 0;                 // in which a branch looks for its label
};

// How a cell that is not a register gets its value when a frame is made.
enum class Source : uint8_t { constant, special, kernel_parameter, frame_memory, dynamic_shared };
enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  zero
};

struct CellValue {
  uint32_t cell;
  Source source;
  uint64_t value;
};

struct Parameter {
  std::string name;
  uint32_t offset, bytes;
};

struct Function {
  std::string name;
  bool is_entry = false;
  std::vector<Parameter> parameters, results;  // of a kernel: in the launch's block; of a function: in frame memory
  uint32_t parameter_bytes = 0;
  uint32_t frame_bytes = 0;  // local variables, arguments of calls, own parameters
  uint32_t num_cells = 1;
  uint32_t max_threads = 0;  // .maxntid or .reqntid; 0: not given
  std::vector<CellValue> cell_values;
  std::vector<Instruction> code;
};

struct ModuleVariable {  // .global and .const
  std::unique_ptr<uint8_t[]> data;
  uint32_t bytes;
};

struct Module {
  std::vector<Function> functions;
  std::map<std::string, int> function_index;
  std::map<std::string, ModuleVariable> variables;
  std::map<std::string, uint32_t> shared;  // offsets of static variables
  uint32_t static_shared_bytes = 0, dynamic_alignment = 16;
  uint32_t dynamic_shared_offset() const { return (static_shared_bytes + dynamic_alignment - 1) / dynamic_alignment * dynamic_alignment; }
};

// Throws PtxError naming everything that it does not understand.
std::unique_ptr<Module> parse_ptx(const std::string& text);

// Fills opcode, types and modifiers from the parts of a mnemonic; operands are there already. Returns what it does not support, or "".
std::string decode(const std::vector<std::string>& mnemonic, Instruction&);

}  // namespace emulator
