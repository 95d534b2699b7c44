"""The portable kernels on NEON (`make test-aarch64`): cpu_kernels_driver.cpp, compiled for aarch64 and run by QEMU.

It compares every pass and dtype with double loops. Whether a tile keeps its sums in registers is read from the machine code.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from compiled import compiled

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/aarch64"
CXX, OBJDUMP, EMULATOR = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler has its libraries


@pytest.fixture(scope="module")
def driver() -> Path:
    for tool in (CXX, OBJDUMP, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} was not found (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    sources = {ROOT / f"csrc/cpu/{name}.cpp": "-O3 -Wall -Wextra -Werror" for name in ("dispatch", "isa_base")}
    sources[ROOT / "tests/cpu_kernels_driver.cpp"] = "-O1"
    return compiled(BUILD / "driver", sources, f"-std=c++17 -fopenmp -I{ROOT / 'csrc'}", "-fopenmp", cxx=CXX)


def test_kernels_are_right_on_neon(driver: Path) -> None:
    result = subprocess.run([EMULATOR, "-L", SYSTEM, driver], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "base ok: " in result.stdout


def test_the_register_tile_does_not_spill(driver: Path) -> None:
    """Every loop with the 24 multiply-adds of a full tile: six elements of a, four vectors of b, and nothing is stored."""
    code = subprocess.run([OBJDUMP, "-d", "--no-show-raw-insn", BUILD / "isa_base.o"], capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t") for line in code.splitlines() if line.startswith(" ")]
    places = {line[0].strip(" :"): place for place, line in enumerate(lines)}
    loops = []
    for end, (_, mnemonic, *operands) in enumerate(lines):
        target = re.match(r"([0-9a-f]+) <", operands[0]) if mnemonic.startswith("b.") else None
        if target and places.get(target[1], end) < end:
            loops.append([line[1] for line in lines[places[target[1]] : end + 1]])
    tiles = [loop for loop in loops if loop.count("fmla") == 24 and len(loop) < 60]
    assert tiles
    for tile in tiles:
        assert not [mnemonic for mnemonic in tile if mnemonic.startswith("st")], tile
