// From mnemonics to opcodes. Every part of a mnemonic must be known: an instruction is never executed with a modifier ignored, unless
// the modifier cannot change what the emulator computes (cache hints, orders and scopes within a block).
#include <algorithm>
#include <cfenv>
#include <set>

#include "ptx_program.h"
#include "tma.h"
#include "warp_operations.h"

namespace emulator {
namespace {

using Parts = std::vector<std::string>;

const std::map<std::string, Type> TYPES = {{"pred", Type::pred}, {"b8", Type::b8},       {"u8", Type::u8},        {"s8", Type::s8},
                                           {"b16", Type::b16},   {"u16", Type::u16},     {"s16", Type::s16},      {"b32", Type::b32},
                                           {"u32", Type::u32},   {"s32", Type::s32},     {"b64", Type::b64},      {"u64", Type::u64},
                                           {"s64", Type::s64},   {"f16", Type::f16},     {"f32", Type::f32},      {"bf16", Type::bf16},
                                           {"f64", Type::f64},   {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}};

const std::map<std::string, std::pair<Comparison, bool>> COMPARISONS = {
    {"eq", {Comparison::eq, false}},   {"ne", {Comparison::ne, false}},  {"lt", {Comparison::lt, false}}, {"le", {Comparison::le, false}},
    {"gt", {Comparison::gt, false}},   {"ge", {Comparison::ge, false}},  {"lo", {Comparison::lt, false}}, {"ls", {Comparison::le, false}},
    {"hi", {Comparison::gt, false}},   {"hs", {Comparison::ge, false}},  {"equ", {Comparison::eq, true}}, {"neu", {Comparison::ne, true}},
    {"ltu", {Comparison::lt, true}},   {"leu", {Comparison::le, true}},  {"gtu", {Comparison::gt, true}}, {"geu", {Comparison::ge, true}},
    {"num", {Comparison::num, false}}, {"nan", {Comparison::nan, false}}};

// Same result with and without, here: cache hints, orders and scopes of what concerns one block, alignment of warps, the only rounding
// there is.
const std::set<std::string> HARMLESS = {"sync", "aligned", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "weak", "cta",
                                        "gpu",  "sys",     "cluster",  "nc",      "ca",      "cg",      "cs",      "lu", "cv",   "wb",
                                        "wt",   "uni",     "rn",       "approx",  "full",    "noftz",   "mmio",    "ptr"};

const std::map<std::string, Opcode> PLAIN = {
    {"mov", Opcode::mov},          {"add", Opcode::add},           {"sub", Opcode::sub},           {"fma", Opcode::fma},
    {"div", Opcode::div},          {"rem", Opcode::rem},           {"min", Opcode::min},           {"max", Opcode::max},
    {"neg", Opcode::neg},          {"abs", Opcode::abs},           {"and", Opcode::and_},          {"or", Opcode::or_},
    {"xor", Opcode::xor_},         {"not", Opcode::not_},          {"shl", Opcode::shl},           {"shr", Opcode::shr},
    {"selp", Opcode::selp},        {"ex2", Opcode::ex2},           {"lg2", Opcode::lg2},           {"rcp", Opcode::rcp},
    {"sqrt", Opcode::sqrt},        {"rsqrt", Opcode::rsqrt},       {"tanh", Opcode::tanh},         {"sin", Opcode::sin},
    {"cos", Opcode::cos},          {"bfi", Opcode::bfi},           {"bfe", Opcode::bfe},           {"bfind", Opcode::bfind},
    {"brev", Opcode::brev},        {"prmt", Opcode::prmt},         {"lop3", Opcode::lop3},         {"popc", Opcode::popc},
    {"clz", Opcode::clz},          {"copysign", Opcode::copysign}, {"ret", Opcode::ret},           {"exit", Opcode::exit},
    {"trap", Opcode::trap},        {"bra", Opcode::branch},        {"call", Opcode::call},         {"nanosleep", Opcode::pause},
    {"prefetch", Opcode::nop},     {"prefetchu", Opcode::nop},     {"membar", Opcode::fence},      {"griddepcontrol", Opcode::nop},
    {"createpolicy", Opcode::nop}, {"discard", Opcode::nop},       {"applypriority", Opcode::nop}, {"pmevent", Opcode::nop}};

// Takes modifiers out of the mnemonic one after the other; what is left at the end is not supported.
class Modifiers {
 public:
  explicit Modifiers(const Parts& mnemonic) : parts(mnemonic.begin() + 1, mnemonic.end()) {}

  bool take(const std::string& part) {
    const auto found = std::find(parts.begin(), parts.end(), part);
    if (found == parts.end()) return false;
    parts.erase(found);
    return true;
  }
  bool take_prefix(const std::string& prefix) {
    const auto found =
        std::find_if(parts.begin(), parts.end(), [&](const std::string& part) { return part.compare(0, prefix.size(), prefix) == 0; });
    if (found == parts.end()) return false;
    parts.erase(found);
    return true;
  }
  // The index among `names` of the one that is there; -1 if none is.
  int take_one_of(std::initializer_list<const char*> names) {
    int i = 0;
    for (const char* name : names) {
      if (take(name)) return i;
      ++i;
    }
    return -1;
  }
  std::vector<Type> take_types() {
    std::vector<Type> types;
    for (auto part = parts.begin(); part != parts.end();) {
      const Type type = parse_type(*part);
      if (type == Type::none) {
        ++part;
        continue;
      }
      types.push_back(type);
      part = parts.erase(part);
    }
    return types;
  }
  const Parts& all() const { return parts; }
  std::string left() {
    std::string text;
    for (const std::string& part : parts)
      if (!HARMLESS.count(part) && part.compare(0, 4, "L1::") && part.compare(0, 4, "L2::")) text += "." + part;
    return text;
  }

 private:
  Parts parts;
};

bool is_float(Type type) { return type == Type::f32 || type == Type::f64; }

bool decode_space(Modifiers& modifiers, Instruction& instruction) {
  if (modifiers.take("global")) return instruction.space = Space::global, true;
  if (modifiers.take("shared") || modifiers.take("shared::cta")) return instruction.space = Space::shared, true;
  if (modifiers.take("param") || modifiers.take("param::entry") || modifiers.take("param::func"))
    return instruction.space = Space::param, true;
  if (modifiers.take("local")) return instruction.space = Space::local, true;
  if (modifiers.take("const")) return instruction.space = Space::constant, true;
  return false;
}

int vector_length(Modifiers& modifiers) { return modifiers.take("v4") ? 4 : modifiers.take("v2") ? 2 : 1; }

bool decode_cp_async(Modifiers& modifiers, Instruction& instruction, bool is_reduction) {
  if (!modifiers.take("async")) return false;
  if (modifiers.take("bulk")) {
    if (modifiers.take("commit_group")) return instruction.opcode = Opcode::bulk_commit, true;
    if (modifiers.take("wait_group")) return instruction.flag = modifiers.take("read"), instruction.opcode = Opcode::bulk_wait, true;
    if (modifiers.take("prefetch")) return modifiers.take("tensor"), modifiers.take_prefix(""), instruction.opcode = Opcode::nop, true;
    const Parts& parts = modifiers.all();
    const auto global = std::find(parts.begin(), parts.end(), "global");
    const auto shared = std::find_if(parts.begin(), parts.end(), [](const std::string& part) { return part.compare(0, 6, "shared") == 0; });
    const bool is_store = global < shared, is_tensor = modifiers.take("tensor");
    modifiers.take("global"), modifiers.take_prefix("shared"), modifiers.take("bulk_group"), modifiers.take("tile");
    modifiers.take("mbarrier::complete_tx::bytes");
    if (is_tensor) modifiers.take_one_of({"1d", "2d", "3d", "4d", "5d"});
    instruction.variant = int(StoreKind::copy);
    if (is_reduction) {
      if (!is_store || !modifiers.take("add")) return false;
      const Type type = instruction.types.empty() ? Type::f32 : instruction.types[0];  // a tensor reduction adds in the map's type
      static const std::map<Type, StoreKind> KINDS = {{Type::f32, StoreKind::add_f32},
                                                      {Type::f16, StoreKind::add_f16},
                                                      {Type::bf16, StoreKind::add_bf16},
                                                      {Type::u32, StoreKind::add_32},
                                                      {Type::s32, StoreKind::add_32}};
      const auto kind = KINDS.find(type);
      if (kind == KINDS.end()) return false;
      instruction.variant = int(kind->second);
    }
    instruction.opcode =
        is_tensor ? (is_store ? Opcode::tma_store : Opcode::tma_load) : (is_store ? Opcode::bulk_store : Opcode::bulk_load);
    return true;
  }
  if (modifiers.take("commit_group")) return instruction.opcode = Opcode::cp_async_commit, true;
  if (modifiers.take("wait_group")) return instruction.opcode = Opcode::cp_async_wait, true;
  if (modifiers.take("wait_all")) return instruction.opcode = Opcode::cp_async_wait_all, true;
  if (modifiers.take("mbarrier") && modifiers.take("arrive")) {
    instruction.flag = modifiers.take("noinc");
    modifiers.take_prefix("shared");
    return instruction.opcode = Opcode::cp_async_mbarrier_arrive, true;
  }
  modifiers.take("global"), modifiers.take_prefix("shared");
  return instruction.opcode = Opcode::cp_async, true;
}

bool decode_mbarrier(Modifiers& modifiers, Instruction& instruction) {
  modifiers.take_prefix("shared");
  if (modifiers.take("init")) return instruction.opcode = Opcode::mbarrier_init, true;
  if (modifiers.take("inval")) return instruction.opcode = Opcode::mbarrier_inval, true;
  if (modifiers.take("arrive")) {
    instruction.flag = modifiers.take("expect_tx");
    modifiers.take("noComplete");
    return instruction.opcode = Opcode::mbarrier_arrive, true;
  }
  if (modifiers.take("expect_tx")) return instruction.opcode = Opcode::mbarrier_expect_tx, true;
  const bool is_try = modifiers.take("try_wait");
  if (!is_try && !modifiers.take("test_wait")) return false;
  instruction.opcode = is_try ? Opcode::mbarrier_try_wait : Opcode::mbarrier_test_wait;
  return modifiers.take("parity");  // waiting on a state token is not supported
}

// "m64n128k16" and the like; false if the numbers are others than `m` and `k` (0: any).
bool decode_shape(Modifiers& modifiers, int m, int& n, int& k) {
  for (const std::string& part : modifiers.all()) {
    int found_m, found_n, found_k;
    if (sscanf(part.c_str(), "m%dn%dk%d", &found_m, &found_n, &found_k) != 3) continue;
    const std::string shape = part;
    n = found_n;
    k = found_k;
    return modifiers.take(shape) && found_m == m;
  }
  return false;
}

bool decode_wgmma(Modifiers& modifiers, Instruction& instruction) {
  if (modifiers.take("fence")) return instruction.opcode = Opcode::wgmma_fence, true;
  if (modifiers.take("commit_group")) return instruction.opcode = Opcode::wgmma_commit, true;
  if (modifiers.take("wait_group")) return instruction.opcode = Opcode::wgmma_wait, true;
  int k = 0;
  const std::vector<Type>& types = instruction.types;  // D, A, B
  instruction.opcode = Opcode::wgmma;
  if (!modifiers.take("mma_async") || !decode_shape(modifiers, 64, instruction.variant, k) || types.size() != 3) return false;
  const bool half = types[0] == Type::f16, valid_inputs = types[1] == types[2] && (types[1] == Type::bf16 || types[1] == Type::f16);
  const int n = instruction.variant;
  return k == 16 && n % 8 == 0 && n >= 8 && n <= 256 && valid_inputs && (half ? types[1] == Type::f16 : types[0] == Type::f32) &&
         int(instruction.operands[0].cells.size()) == (half ? n / 4 : n / 2);
}

bool decode_mma(Modifiers& modifiers, Instruction& instruction) {
  int n = 0;
  const std::vector<Type>& types = instruction.types;  // D, A, B, C
  instruction.opcode = Opcode::mma;
  if (!modifiers.take("row") || !modifiers.take("col") || !decode_shape(modifiers, 16, n, instruction.variant) || types.size() != 4)
    return false;
  const bool half = types[0] == Type::f16, valid_inputs = types[1] == types[2] && (types[1] == Type::bf16 || types[1] == Type::f16);
  return n == 8 && (instruction.variant == 8 || instruction.variant == 16) && types[0] == types[3] && valid_inputs &&
         (half ? types[1] == Type::f16 : types[0] == Type::f32);
}

// The order and scope of a load, a store, an atomic or a fence; volatile accesses are relaxed ones.
void decode_order(Modifiers& modifiers, Instruction& instruction, Order unless_given) {
  modifiers.take("mmio");
  const int order = modifiers.take_one_of({"weak", "relaxed", "acquire", "release", "acq_rel"});
  instruction.order = modifiers.take("volatile") ? Order::relaxed : order >= 0 ? Order(order) : unless_given;
  instruction.gpu_scope = instruction.order != Order::weak && modifiers.take_one_of({"cta", "cluster"}) < 0;
}

bool decode_fence(Modifiers& modifiers, Instruction& instruction) {
  if (modifiers.take("proxy")) {
    const bool to_generic = modifiers.take("async::generic"), only_global = modifiers.take("global"),
               only_shared = modifiers.take_prefix("shared");
    instruction.opcode = to_generic ? Opcode::nop : Opcode::fence_proxy_async;
    instruction.variant = (only_global ? 0 : FENCES_SHARED) | (only_shared ? 0 : FENCES_GLOBAL);
    return modifiers.take("async");
  }
  if (modifiers.take("mbarrier_init")) return instruction.opcode = Opcode::fence_mbarrier_init, true;
  instruction.opcode = Opcode::fence;
  modifiers.take("sc");
  decode_order(modifiers, instruction, Order::acq_rel);
  return instruction.order == Order::acq_rel;
}

bool decode_barrier(Modifiers& modifiers, Instruction& instruction) {
  if (modifiers.take("warp")) return instruction.opcode = Opcode::syncwarp, true;
  const Parts& parts = modifiers.all();
  if (std::find(parts.begin(), parts.end(), "cluster") != parts.end()) {  // a cluster of one block: arrive and wait are one barrier
    instruction.opcode = modifiers.take("wait") ? Opcode::barrier : Opcode::nop;
    modifiers.take("arrive");
    return true;
  }
  if (modifiers.take("arrive")) return instruction.opcode = Opcode::barrier_arrive, true;
  if (modifiers.take("red")) {
    instruction.opcode = Opcode::barrier_reduce;
    return (instruction.variant = modifiers.take_one_of({"popc", "and", "or"})) >= 0;
  }
  return instruction.opcode = Opcode::barrier, true;
}

bool decode_atomic(Modifiers& modifiers, Instruction& instruction, bool returns) {
  instruction.opcode = Opcode::atomic;
  instruction.flag = returns;
  decode_order(modifiers, instruction, Order::relaxed);
  decode_space(modifiers, instruction);
  instruction.vector = uint8_t(vector_length(modifiers));
  const int kind = modifiers.take_one_of({"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"});
  instruction.atomic = AtomicKind(kind);
  const Type type = instruction.type;
  const bool is_16_bit_float = type == Type::f16 || type == Type::bf16 || type == Type::f16x2 || type == Type::bf16x2;
  return kind >= 0 && (is_16_bit_float ? instruction.atomic == AtomicKind::add : size_of(type) >= 4);
}

bool decode_opcode(const std::string& base, Modifiers& modifiers, Instruction& instruction) {
  const auto set = [&](Opcode opcode) { return instruction.opcode = opcode, true; };
  if (base == "mul" || base == "mad") {
    const bool mad = base == "mad";
    if (modifiers.take("wide")) return set(mad ? Opcode::mad_wide : Opcode::mul_wide);
    if (modifiers.take("hi")) return set(mad ? Opcode::mad_hi : Opcode::mul_hi);
    modifiers.take("lo");
    return set(mad ? (is_float(instruction.type) ? Opcode::fma : Opcode::mad) : Opcode::mul);
  }
  if (base == "shf") {
    instruction.flag = modifiers.take("l");
    modifiers.take("r");
    instruction.variant = modifiers.take("wrap");
    modifiers.take("clamp");
    return set(Opcode::shf);
  }
  if (base == "setp") {
    for (const auto& [name, comparison] : COMPARISONS)
      if (modifiers.take(name)) {
        std::tie(instruction.comparison, instruction.unordered) = comparison;
        instruction.combination = Combination(1 + modifiers.take_one_of({"and", "or", "xor"}));
        return set(Opcode::setp);
      }
    return false;
  }
  if (base == "cvt") {
    instruction.rounding = Rounding(1 + modifiers.take_one_of({"rzi", "rni", "rmi", "rpi"}));
    return set(Opcode::cvt);
  }
  if (base == "cvta") return instruction.flag = modifiers.take("to"), decode_space(modifiers, instruction) && set(Opcode::cvta);
  if (base == "isspacep") return decode_space(modifiers, instruction) && set(Opcode::isspacep);
  if (base == "ld" || base == "ldu" || base == "st") {
    decode_order(modifiers, instruction, Order::weak);
    decode_space(modifiers, instruction);
    instruction.vector = uint8_t(vector_length(modifiers));
    return set(base == "st" ? Opcode::store : Opcode::load);
  }
  if (base == "atom" || base == "red") return decode_atomic(modifiers, instruction, base == "atom");
  if (base == "bar" || base == "barrier") return decode_barrier(modifiers, instruction);
  if (base == "shfl") return (instruction.variant = modifiers.take_one_of({"bfly", "up", "down", "idx"})) >= 0 && set(Opcode::shuffle);
  if (base == "vote") return (instruction.variant = modifiers.take_one_of({"ballot", "any", "all"})) >= 0 && set(Opcode::vote);
  if (base == "redux")
    return (instruction.variant = modifiers.take_one_of({"add", "min", "max", "and", "or", "xor"})) >= 0 && set(Opcode::redux);
  if (base == "elect") return set(Opcode::elect);
  if (base == "ldmatrix" || base == "stmatrix") {
    const int log2_count = modifiers.take_one_of({"x1", "x2", "x4"});
    instruction.variant = 1 << log2_count;
    instruction.flag = modifiers.take("trans");
    modifiers.take_prefix("shared");
    return modifiers.take("m8n8") && log2_count >= 0 && set(base == "ldmatrix" ? Opcode::ldmatrix : Opcode::stmatrix);
  }
  if (base == "movmatrix") return modifiers.take("m8n8") && modifiers.take("trans") && set(Opcode::movmatrix);
  if (base == "mma") return decode_mma(modifiers, instruction);
  if (base == "cp")
    return (modifiers.take("reduce") ? decode_cp_async(modifiers, instruction, true) : decode_cp_async(modifiers, instruction, false));
  if (base == "mbarrier") return decode_mbarrier(modifiers, instruction);
  if (base == "fence") return decode_fence(modifiers, instruction);
  if (base == "wgmma") return decode_wgmma(modifiers, instruction);
  if (base == "brx") return modifiers.take("idx") && set(Opcode::branch_table);
  if (base == "setmaxnreg")
    return instruction.flag = modifiers.take("inc"), (instruction.flag || modifiers.take("dec")) && set(Opcode::setmaxnreg);
  const auto plain = PLAIN.find(base);
  if (plain == PLAIN.end()) return false;
  if (plain->second == Opcode::nop)
    while (modifiers.take_prefix("")) continue;
  if (base == "bfind") instruction.flag = modifiers.take("shiftamt");
  if (base == "membar") instruction.gpu_scope = !modifiers.take("cta"), modifiers.take("gl");
  modifiers.take("b32");
  return set(plain->second);
}

}  // namespace

Type parse_type(const std::string& name) {
  const auto found = TYPES.find(name);
  return found == TYPES.end() ? Type::none : found->second;
}

uint32_t size_of(Type type) {
  switch (type) {
    case Type::b8:
    case Type::u8:
    case Type::s8:
      return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64:
      return 8;
    default:
      return 4;
  }
}

std::string decode(const std::vector<std::string>& mnemonic, Instruction& instruction) {
  Modifiers modifiers(mnemonic);
  instruction.types = modifiers.take_types();
  if (!instruction.types.empty()) instruction.type = instruction.types[0];
  if (instruction.types.size() > 1) instruction.type2 = instruction.types[1];
  instruction.flush = modifiers.take("ftz");
  instruction.saturate = modifiers.take("sat");
  instruction.nan_wins = modifiers.take("NaN");
  instruction.relu = (mnemonic[0] == "min" || mnemonic[0] == "max") && instruction.type == Type::s32 && modifiers.take("relu");
  if (modifiers.take("L2::cache_hint") && !instruction.operands.empty()) instruction.operands.pop_back();
  if (!decode_opcode(mnemonic[0], modifiers, instruction)) return "not supported";
  if (mnemonic[0] == "setp" && instruction.types.size() != 1) return "not supported";
  const bool rounds = is_float(instruction.type) && (instruction.opcode != Opcode::cvt || !is_float(instruction.type2));
  if (rounds)
    instruction.float_rounding = modifiers.take("rz")   ? FE_TOWARDZERO
                                 : modifiers.take("rm") ? FE_DOWNWARD
                                 : modifiers.take("rp") ? FE_UPWARD
                                                        : 0;
  const std::string left = modifiers.left();
  return left.empty() ? "" : left + " is not supported";
}

}  // namespace emulator
