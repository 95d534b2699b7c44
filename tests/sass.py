"""Reads the machine code of a compiled kernel: its instructions, its loops, and which of them are hot.

A hot loop is an innermost loop among those that hold matrix products. Loops are natural loops: an edge back to a block that dominates
its source, with everything that reaches the source without passing that block.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from cuda_tools import find_cuda_tool

MATRIX_PRODUCT = re.compile(r"(HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|UTC\w*MMA)(\.|$)")
FUSED_MULTIPLY_ADD = re.compile(r"FFMA2?(\.|$)")  # what float32 products without tensor cores are made of
LEAST_MULTIPLY_ADDS = 64  # in a loop, to count as a matrix product

FUNCTION = re.compile(r"//-+ \.text\.(\S+)\s+-+")  # in front of each kernel's instructions
LABEL = re.compile(r"\s*(\.L\S+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*)")
TARGET = re.compile(r"(\.L_?\w+)")
ENDS_BLOCK = {"BRA", "BRX", "JMP", "EXIT", "RET"}


class Instruction(NamedTuple):
    opcode: str  # with its modifiers, such as HMMA.16816.F32
    operands: str
    predicated: bool  # may do nothing


class Block(NamedTuple):
    """Instructions that run one after the other: numbers [start, end)."""

    start: int
    end: int


def disassemble(cubin: bytes) -> str:
    nvdisasm = find_cuda_tool("nvdisasm")
    if nvdisasm is None:
        raise RuntimeError("no nvdisasm: it comes with triton and with the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout


def functions(listing: str) -> dict[str, str]:
    """The listing of each kernel in a cubin."""
    pieces = FUNCTION.split(listing)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and for each label the number of the instruction that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if match := LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := INSTRUCTION.match(line):
            instructions.append(Instruction(match[2], match[3], match[1] is not None))
    return instructions, labels


def jump_target(instruction: Instruction, labels: dict[str, int]) -> int | None:
    match = TARGET.search(instruction.operands)
    return labels.get(match[1]) if match else None


def is_conditional(instruction: Instruction) -> bool:
    """A branch is conditional by a predicate in front of it or as its first operand, or by divergence of the warp."""
    return instruction.predicated or ".DIV" in instruction.opcode or re.match(r"!?U?P\d", instruction.operands) is not None


def control_flow(instructions: list[Instruction], labels: dict[str, int]) -> tuple[list[Block], list[set[int]]]:
    """The basic blocks in order of their first instruction, and the numbers of the blocks that may follow each."""
    starts = {0, *labels.values()}
    starts |= {number + 1 for number, instruction in enumerate(instructions) if instruction.opcode.split(".")[0] in ENDS_BLOCK}
    ordered = sorted(start for start in starts if start < len(instructions))
    blocks = [Block(start, end) for start, end in zip(ordered, [*ordered[1:], len(instructions)], strict=True)]
    number_at = {block.start: number for number, block in enumerate(blocks)}
    successors: list[set[int]] = []
    for number, block in enumerate(blocks):
        last = instructions[block.end - 1]
        ends = last.opcode.split(".")[0] in ENDS_BLOCK
        target = jump_target(last, labels) if ends else None
        following = {number_at[target]} if target in number_at else set()
        if (not ends or is_conditional(last)) and number + 1 < len(blocks):
            following.add(number + 1)
        successors.append(following)
    return blocks, successors


def dominators(successors: list[set[int]]) -> dict[int, set[int]]:
    """For each node that node 0 reaches, the nodes that every way to it passes, itself among them."""
    reached, work = {0}, [0]
    while work:
        for node in successors[work.pop()] - reached:
            reached.add(node)
            work.append(node)
    predecessors: dict[int, set[int]] = {node: set() for node in reached}
    for node in reached:
        for successor in successors[node]:
            predecessors[successor].add(node)
    result = {node: set(reached) for node in reached}
    result[0] = {0}
    changed = True
    while changed:
        changed = False
        for node in sorted(reached - {0}):
            passed = {node} | set.intersection(*(result[predecessor] for predecessor in predecessors[node]))
            if passed != result[node]:
                result[node] = passed
                changed = True
    return result


def natural_loops(successors: list[set[int]]) -> dict[int, set[int]]:
    """{header: nodes of its loop, the header among them}"""
    dominating = dominators(successors)
    predecessors: dict[int, set[int]] = {node: set() for node in dominating}
    for node in dominating:
        for successor in successors[node]:
            predecessors[successor].add(node)
    loops: dict[int, set[int]] = {}
    for node in dominating:
        for header in successors[node] & dominating[node]:
            body = loops.setdefault(header, {header})
            work = [node]
            while work:
                inside = work.pop()
                if inside not in body:
                    body.add(inside)
                    work += predecessors[inside]
    return loops


def hot_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """The instructions of every innermost loop with matrix products; where no loop has any, of those with many multiply-adds."""
    blocks, successors = control_flow(instructions, labels)
    loops = natural_loops(successors)
    bodies = {header: [instructions[n] for b in sorted(body) for n in range(*blocks[b])] for header, body in loops.items()}
    products = {header for header, body in bodies.items() if any(MATRIX_PRODUCT.match(i.opcode) for i in body)}
    if not products:
        products = {h for h, body in bodies.items() if sum(bool(FUSED_MULTIPLY_ADD.match(i.opcode)) for i in body) >= LEAST_MULTIPLY_ADDS}
    return [bodies[header] for header in sorted(products) if not any(loops[other] < loops[header] for other in products)]
