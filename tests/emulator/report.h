// What the emulator found wrong with a kernel, as data, and the places in the kernel's source that reports name.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// A line of the kernel's source: an index into the table behind intern_location(). 0 is "unknown".
using Location = uint32_t;
Location intern_location(const std::string& file, int line);
std::string to_string(Location);  // "forward.cuh:125"
bool same_line(Location, Location);

struct Report {
  std::string kind;     // "race", "in-flight-read", "deadlock", ...: docs of emulator/__init__.py list them
  std::string message;  // one finding, with addresses as smem+offset and the other party of a race
  std::string where;    // file:line of the offending instruction
  uint32_t block[3];
  int thread;      // within the block; -1 for findings about the whole block
  uint64_t count;  // how often this kind was found at this line
};

// Findings of the running launch. The same kind at the same line is kept once and counted.
void begin_reports();
const std::vector<Report>& reports();
bool too_many_findings();  // the launch stops early
void report(const char* kind, Location where, const char* format, ...) __attribute__((format(printf, 3, 4)));

}  // namespace emulator
