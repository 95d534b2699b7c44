#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <map>
#include <utility>

#include "scheduler.h"

namespace emulator {
namespace {

constexpr size_t MAX_DISTINCT = 40;         // beyond it findings are only counted
constexpr uint64_t MAX_FINDINGS = 100'000;  // beyond it the launch stops: the rest would say the same

std::vector<std::pair<std::string, int>> locations = {{"?", 0}};
std::map<std::pair<std::string, int>, Location> location_ids;

std::vector<Report> found;
std::map<std::pair<std::string, Location>, size_t> found_at;
uint64_t findings;

}  // namespace

Location intern_location(const std::string& file, int line) {
  auto [entry, is_new] = location_ids.try_emplace({file, line}, Location(locations.size()));
  if (is_new) locations.emplace_back(file, line);
  return entry->second;
}

std::string to_string(Location location) {
  const auto& [file, line] = locations[location];
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(line);
}

bool same_line(Location a, Location b) { return a == b || locations[a] == locations[b]; }

void begin_reports() {
  found.clear();
  found_at.clear();
  findings = 0;
}

const std::vector<Report>& reports() { return found; }

bool too_many_findings() { return findings > MAX_FINDINGS; }

void report(const char* kind, Location where, const char* format, ...) {
  ++findings;
  auto [entry, is_new] = found_at.try_emplace({kind, where}, found.size());
  if (!is_new) {
    if (entry->second < found.size()) ++found[entry->second].count;
    return;
  }
  if (found.size() >= MAX_DISTINCT) return;
  char message[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  const Dim3 block = running ? running->index : Dim3{0, 0, 0};
  found.push_back({kind, message, to_string(where), {block.x, block.y, block.z}, current ? int(current->index) : -1, 1});
}

}  // namespace emulator
