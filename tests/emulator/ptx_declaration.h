// Pieces of PTX text, and declarations of variables.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ptx_program.h"

namespace emulator {

std::string trim(const std::string& text);
// Splits at separators outside brackets.
std::vector<std::string> split(const std::string& text, char separator);
bool contains(const std::string& text, const char* part);
std::string inside(const std::string& bracketed);
std::string without_comments(const std::string& text);
uint32_t align_up(uint32_t value, uint32_t alignment);

// ".align 16 .b8 name[64]" and the like; after the state space.
struct Declaration {
  std::string name;
  Type type = Type::b32;
  uint32_t alignment = 4, bytes = 4;

  explicit Declaration(std::string text);
};

}  // namespace emulator
