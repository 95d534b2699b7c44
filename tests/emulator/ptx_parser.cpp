// Reads the text of a PTX module, as nvcc and Triton write it: variables, function headers, and bodies as lists of instructions.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "ptx_declaration.h"
#include "ptx_program.h"
#include "shared_memory.h"

namespace emulator {
namespace {

const std::map<std::string, Special> SPECIALS = {
    {"%tid.x", Special::tid_x},     {"%tid.y", Special::tid_y},       {"%tid.z", Special::tid_z},         {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},   {"%ntid.z", Special::ntid_z},     {"%ctaid.x", Special::ctaid_x},     {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z}, {"%nctaid.x", Special::nctaid_x}, {"%nctaid.y", Special::nctaid_y},   {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},   {"%warpid", Special::warpid},     {"%smid", Special::zero},           {"%clock", Special::zero},
    {"%clock64", Special::zero},    {"%globaltimer", Special::zero},  {"%cluster_ctarank", Special::zero}};

// Names of registers, parameters and local variables, and labels, within { }.
struct Scope {
  std::map<std::string, uint32_t> cells;
  int number, parent;
};

class Parser {
 public:
  Parser(const std::string& source, Module& parsed) : module(parsed), text(without_comments(source)) {}

  void parse() {
    find_files();
    while (skip_space(), position < text.size()) {
      if (function)
        parse_in_body();
      else
        parse_at_module_level();
    }
    for (Function& f : module.functions) resolve_calls(f);
    if (!errors.empty()) throw PtxError("PTX: " + errors.substr(0, 1000));
  }

 private:
  Module& module;
  const std::string text;
  size_t position = 0;
  std::string errors;
  std::map<int, std::string> files;
  Location where = 0, where_in_kernel = 0;

  Function* function = nullptr;  // whose body is being read
  std::vector<Scope> scopes;
  std::vector<int> scope_parent;                      // by scope number
  std::map<std::pair<int, std::string>, int> labels;  // by scope number and name
  std::map<std::string, std::vector<std::string>> label_tables;
  std::map<std::pair<Source, uint64_t>, uint32_t> value_cells;

  void error(const std::string& message) {
    if (!contains(errors, message.c_str())) errors += (errors.empty() ? "" : "; ") + message + " (" + to_string(where) + ")";
  }

  void skip_space() {
    while (position < text.size() && isspace(uint8_t(text[position]))) ++position;
  }
  bool at(const char* prefix) const { return text.compare(position, strlen(prefix), prefix) == 0; }
  // The text up to one of `ends`, which is consumed.
  std::string take_until(const char* ends) {
    const size_t end = std::min(text.find_first_of(ends, position), text.size());
    const std::string taken = text.substr(position, end - position);
    position = end + 1;
    return taken;
  }
  // The text between ( and the matching ), or { and }; the cursor is at the opening one.
  std::string take_bracketed() {
    int depth = 0;
    const size_t begin = position;
    do {
      const char c = text[position++];
      depth += (c == '{' || c == '(') - (c == '}' || c == ')');
    } while (depth && position < text.size());
    return text.substr(begin + 1, position - begin - 2);
  }

  void find_files() {
    for (size_t i = 0; (i = text.find("\t.file\t", i)) != std::string::npos; ++i) {
      const size_t quote = text.find('"', i);
      files[atoi(text.c_str() + i + 7)] = text.substr(quote + 1, text.find('"', quote + 1) - quote - 1);
    }
  }

  void parse_at_module_level() {
    if (at(".version") || at(".target") || at(".address_size") || at(".file") || at(".loc")) {
      take_until("\n");
    } else if (at(".section")) {
      position = text.find('{', position);
      take_bracketed();
    } else {
      const size_t end = text.find_first_of(";({", position);
      const std::string head = text.substr(position, end - position);
      if (contains(head, ".entry") || contains(head, ".func")) {
        parse_function_header();
      } else if (contains(head, ".shared")) {
        declare_shared(take_until(";"));
      } else if (contains(head, ".global") || contains(head, ".const")) {
        declare_variable(take_until(";"));
      } else {
        error("cannot read " + trim(head.substr(0, 60)));
        position = text.size();
      }
    }
  }

  void declare_shared(const std::string& statement) {
    const Declaration declaration(statement);
    if (contains(statement, ".extern")) {
      module.dynamic_alignment = std::max(module.dynamic_alignment, declaration.alignment);
      module.shared[declaration.name] = DYNAMIC;
    } else {
      module.static_shared_bytes = align_up(module.static_shared_bytes, declaration.alignment);
      module.shared[declaration.name] = module.static_shared_bytes;
      module.static_shared_bytes += declaration.bytes;
    }
  }

  void declare_variable(const std::string& statement) {
    const Declaration declaration(statement);
    ModuleVariable variable{std::make_unique<uint8_t[]>(declaration.bytes + 16), declaration.bytes};
    const size_t equals = statement.find('=');
    if (equals != std::string::npos) {
      std::string values = trim(statement.substr(equals + 1));
      if (values[0] == '{') values = inside(values);
      uint32_t offset = 0;
      for (const std::string& value : split(values, ',')) {
        uint64_t bits;
        if (!parse_number(value, bits)) error("initial value " + value);
        memcpy(&variable.data[offset], &bits, size_of(declaration.type));
        offset += size_of(declaration.type);
      }
    }
    module.variables[declaration.name] = std::move(variable);
  }

  // [.visible] .entry name (parameters) [directives] {   or   .func (results) name (parameters) [;]
  void parse_function_header() {
    const size_t keyword = std::min(text.find(".entry", position), text.find(".func", position));
    Function f;
    f.is_entry = text.compare(keyword, 6, ".entry") == 0;
    position = keyword + (f.is_entry ? 6 : 5);
    skip_space();
    scopes = {Scope{{}, 0, -1}};
    scope_parent = {-1};
    labels.clear();
    label_tables.clear();
    value_cells.clear();
    function = &f;
    if (text[position] == '(') f.results = parse_parameters(take_bracketed());
    skip_space();
    const size_t name_end = text.find_first_of(" \t\r\n(;{", position);
    f.name = text.substr(position, name_end - position);
    position = name_end;
    skip_space();
    if (text[position] == '(') f.parameters = parse_parameters(take_bracketed());
    function = nullptr;
    const size_t end = text.find_first_of("{;", position);
    const std::string directives = text.substr(position, end - position);
    position = end + 1;
    if (contains(directives, "cluster")) error(f.name + ": clusters are not supported");
    for (const char* directive : {".maxntid", ".reqntid"}) {
      const size_t found = directives.find(directive);
      int x = 1, y = 1, z = 1;
      if (found != std::string::npos) f.max_threads = sscanf(directives.c_str() + found + 8, "%d, %d, %d", &x, &y, &z) ? x * y * z : 0;
    }
    if (text[end] == ';') return;  // a declaration
    module.function_index[f.name] = int(module.functions.size());
    module.functions.push_back(std::move(f));
    function = &module.functions.back();
  }

  std::vector<Parameter> parse_parameters(const std::string& list) {
    std::vector<Parameter> parameters;
    for (const std::string& text_of_one : split(list, ',')) {
      const Declaration declaration(text_of_one);
      uint32_t& size = function->is_entry ? function->parameter_bytes : function->frame_bytes;
      size = align_up(size, declaration.alignment);
      parameters.push_back({declaration.name, size, declaration.bytes});
      scopes[0].cells[declaration.name] = value_cell(function->is_entry ? Source::kernel_parameter : Source::frame_memory, size);
      size += declaration.bytes;
    }
    return parameters;
  }

  uint32_t value_cell(Source source, uint64_t value) {
    const auto [entry, is_new] = value_cells.try_emplace({source, value}, function->num_cells);
    if (is_new) function->cell_values.push_back({function->num_cells++, source, value});
    return entry->second;
  }

  void parse_in_body() {
    if (text[position] == '{') {
      ++position;
      scopes.push_back({{}, int(scope_parent.size()), scopes.back().number});
      scope_parent.push_back(scopes.back().parent);
    } else if (text[position] == '}') {
      ++position;
      scopes.pop_back();
      if (scopes.empty()) end_function();
    } else if (at(".loc") && isspace(uint8_t(text[position + 4]))) {
      parse_location(take_until("\n"));
    } else {
      size_t end = position;
      while (end < text.size() && (isalnum(uint8_t(text[end])) || strchr("_$%", text[end]))) ++end;
      size_t colon = end;
      while (colon < text.size() && isspace(uint8_t(text[colon]))) ++colon;
      if (end > position && text[colon] == ':') {
        const std::string label = text.substr(position, end - position);
        position = colon + 1;
        skip_space();
        if (at(".branchtargets"))
          label_tables[label] = split(take_until(";").substr(strlen(".branchtargets")), ',');
        else
          labels[{scopes.back().number, label}] = int(function->code.size());
      } else {
        parse_statement(trim(take_until(";")));
      }
    }
  }

  // Reports name the line of the kernel, not that of the wrapper in ptx.cuh which was inlined there.
  void parse_location(const std::string& line) {
    int file, number, column;
    if (sscanf(line.c_str(), ".loc %d %d %d", &file, &number, &column) != 3) return;
    const size_t inlined = line.find("inlined_at");
    if (inlined != std::string::npos) sscanf(line.c_str() + inlined, "inlined_at %d %d", &file, &number);
    const std::string& name = files[file];
    if (name.substr(name.rfind('/') + 1) != "ptx.cuh") where_in_kernel = intern_location(name, number);
    where = where_in_kernel;
  }

  void parse_statement(const std::string& statement) {
    if (statement.empty()) return;
    if (statement[0] == '.') return parse_directive(statement);
    Instruction instruction;
    instruction.where = where;
    instruction.scope = scopes.back().number;
    std::string rest = statement;
    if (rest[0] == '@') {
      const size_t space = rest.find_first_of(" \t");
      instruction.guard_negated = rest[1] == '!';
      instruction.guard = int(scalar(rest.substr(1 + instruction.guard_negated, space - 1 - instruction.guard_negated)));
      rest = trim(rest.substr(space));
    }
    const size_t space = std::min(rest.find_first_of(" \t\n"), rest.size());
    const std::string mnemonic = rest.substr(0, space);
    std::vector<std::string> operands = split(rest.substr(space), ',');
    const std::vector<std::string> parts = split(mnemonic, '.');
    if (parts[0] == "bra" || parts[0] == "brx") {
      instruction.name = operands.back();
      operands.pop_back();
    } else if (parts[0] == "call") {
      operands = parse_call(operands, instruction);
    }
    for (const std::string& operand : operands) instruction.operands.push_back(parse_operand(operand));
    const std::string problem = decode(parts, instruction);
    if (!problem.empty()) error(mnemonic + ": " + problem);
    for (size_t i = 0; i < instruction.operands.size() && i < std::size(instruction.cell); ++i)
      if (!instruction.operands[i].cells.empty()) instruction.cell[i] = instruction.operands[i].cells[0];
    function->code.push_back(std::move(instruction));
  }

  // (result), name, (arguments): the operands become the vectors of results and of arguments.
  static std::vector<std::string> parse_call(const std::vector<std::string>& operands, Instruction& instruction) {
    std::string results = "{}", arguments = "{}";
    for (size_t i = 0; i < operands.size(); ++i) {
      if (operands[i][0] != '(')
        instruction.name = operands[i];
      else
        (instruction.name.empty() ? results : arguments) = "{" + inside(operands[i]) + "}";
    }
    return {results, arguments};
  }

  void parse_directive(const std::string& statement) {
    std::istringstream words(statement);
    std::string directive, type, names;
    words >> directive;
    if (directive == ".reg") {
      words >> type;
      std::getline(words, names, '\0');
      for (const std::string& name : split(names, ',')) declare_registers(name);
    } else if (directive == ".shared") {
      declare_shared(statement);
    } else if (directive == ".local" || directive == ".param") {
      const Declaration declaration(statement.substr(directive.size()));
      function->frame_bytes = align_up(function->frame_bytes, declaration.alignment);
      scopes.back().cells[declaration.name] = value_cell(Source::frame_memory, function->frame_bytes);
      function->frame_bytes += declaration.bytes;
    } else if (directive != ".pragma") {
      error("directive " + directive);
    }
  }

  void declare_registers(const std::string& name) {  // %r<100> declares %r0 to %r99
    const size_t bracket = name.find('<');
    if (bracket == std::string::npos) {
      scopes.back().cells[name] = function->num_cells++;
      return;
    }
    const int count = atoi(name.c_str() + bracket + 1);
    for (int i = 0; i < count; ++i) scopes.back().cells[name.substr(0, bracket) + std::to_string(i)] = function->num_cells++;
  }

  static bool parse_number(const std::string& name, uint64_t& value) {
    if (name == "WARP_SZ") return value = 32, true;
    const bool is_float = name.size() > 2 && name[0] == '0' && strchr("fFdD", name[1]);
    if (!is_float && !isdigit(uint8_t(name[0])) && name[0] != '-') return false;
    value = is_float         ? strtoull(name.c_str() + 2, nullptr, 16)
            : name[0] == '-' ? uint64_t(strtoll(name.c_str(), nullptr, 0))
                             : strtoull(name.c_str(), nullptr, 0);
    return true;
  }

  uint32_t scalar(const std::string& name) {
    if (name.empty() || name == "_") return SINK;
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      const auto found = scope->cells.find(name);
      if (found != scope->cells.end()) return found->second;
    }
    uint64_t value;
    if (parse_number(name, value)) return value_cell(Source::constant, value);
    const auto special = SPECIALS.find(name);
    if (special != SPECIALS.end()) return value_cell(Source::special, uint64_t(special->second));
    const auto shared = module.shared.find(name);
    if (shared != module.shared.end())
      return shared->second == DYNAMIC ? value_cell(Source::dynamic_shared, 0) : value_cell(Source::constant, SHARED_BASE + shared->second);
    const auto variable = module.variables.find(name);
    if (variable != module.variables.end()) return value_cell(Source::constant, uint64_t(variable->second.data.get()));
    error("unknown operand " + name);
    return SINK;
  }

  Operand parse_operand(std::string name) {
    Operand operand;
    if (name[0] == '[') {
      operand.is_address = true;
      const std::vector<std::string> parts = split(inside(name), ',');
      name = parts[0];
      const size_t plus = name.find('+', 1);
      if (plus != std::string::npos) {
        operand.offset = strtoll(name.c_str() + plus + 1, nullptr, 0);
        name = trim(name.substr(0, plus));
      }
      if (parts.size() > 1)
        for (const std::string& coordinate : split(inside(parts[1]), ',')) operand.coordinates.push_back(scalar(coordinate));
    }
    if (name[0] == '{') {
      for (const std::string& element : split(inside(name), ',')) operand.cells.push_back(scalar(element));
      return operand;
    }
    operand.negated = name[0] == '!';
    if (operand.negated) name = name.substr(1);
    for (const std::string& element : split(name, '|')) operand.cells.push_back(scalar(element));
    return operand;
  }

  // From the scope of the branch outwards.
  int find_label(const std::string& name, int scope) {
    for (; scope >= 0; scope = scope_parent[scope]) {
      const auto label = labels.find({scope, name});
      if (label != labels.end()) return label->second;
    }
    error("label " + name);
    return 0;
  }

  void end_function() {
    for (Instruction& instruction : function->code) {
      if (instruction.opcode == Opcode::branch) instruction.target = find_label(instruction.name, instruction.scope);
      if (instruction.opcode == Opcode::branch_table)
        for (const std::string& label : label_tables[instruction.name]) instruction.targets.push_back(find_label(label, instruction.scope));
    }
    Instruction last;
    last.opcode = Opcode::ret;
    function->code.push_back(last);
    function = nullptr;
  }

  void resolve_calls(Function& f) {
    for (Instruction& instruction : f.code) {
      if (instruction.opcode != Opcode::call) continue;
      const auto found = module.function_index.find(instruction.name);
      where = instruction.where;
      if (found == module.function_index.end())
        error("call of " + instruction.name + ", which the module does not define");
      else
        instruction.target = found->second;
    }
  }

  static constexpr uint32_t DYNAMIC = ~0u;  // in Module::shared: begins where static shared memory ends
};

}  // namespace

std::unique_ptr<Module> parse_ptx(const std::string& text) {
  auto module = std::make_unique<Module>();
  Parser(text, *module).parse();
  return module;
}

}  // namespace emulator
