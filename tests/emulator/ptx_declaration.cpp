#include "ptx_declaration.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace emulator {

std::string trim(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> pieces;
  std::string piece;
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == separator && depth == 0) {
      pieces.push_back(trim(piece));
      piece.clear();
    } else {
      piece += c;
    }
  }
  if (!trim(piece).empty()) pieces.push_back(trim(piece));
  return pieces;
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }
std::string inside(const std::string& bracketed) { return bracketed.substr(1, bracketed.size() - 2); }
uint32_t align_up(uint32_t value, uint32_t alignment) { return (value + alignment - 1) / alignment * alignment; }

std::string without_comments(const std::string& text) {
  std::string result;
  for (size_t i = 0; i < text.size();) {
    if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      i = std::min(text.find("*/", i), text.size() - 2) + 2;
    } else {
      result += text[i++];
    }
  }
  return result;
}

Declaration::Declaration(std::string text) {
  const size_t equals = text.find('=');
  if (equals != std::string::npos) text = trim(text.substr(0, equals));
  uint32_t count = 1;
  bool aligned = false;
  const size_t bracket = text.find('[');
  if (bracket != std::string::npos) {
    count = uint32_t(strtoul(text.c_str() + bracket + 1, nullptr, 0));
    text = text.substr(0, bracket);
  }
  std::istringstream words(text);
  std::string word;
  while (words >> word) {
    if (word == ".ptr") {  // describes what a kernel's pointer points to
      while (words >> word && word[0] == '.')
        if (word == ".align") words >> word;
    } else if (word == ".align") {
      words >> alignment;
      aligned = true;
    } else if (word[0] == '.' && parse_type(word.substr(1)) != Type::none) {
      type = parse_type(word.substr(1));
    }
    name = word;
  }
  bytes = count * size_of(type);
  if (!aligned) alignment = size_of(type);
}

}  // namespace emulator
