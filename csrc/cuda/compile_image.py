"""Compiles one image: an entry file -> image.ptx -> a cubin for each architecture -> image.fatbin. Run by ninja.

Beside the fatbin it leaves image.log, ptxas's account of registers and spills, and image.json, what it cost.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ptxas", required=True)
    parser.add_argument("--fatbinary", required=True)
    parser.add_argument("--ptx-version", help="what the PTX is to call itself")
    parser.add_argument("--architectures", required=True, help="80,90: those that get machine code")
    parser.add_argument("--built-by", help="unused: another compiler is another command, so that ninja runs it")
    parser.add_argument("source", type=Path)
    parser.add_argument("fatbin", type=Path)
    parser.add_argument("nvcc", nargs="+", help="and its flags; all that is positional follows a --")
    options = parser.parse_args()
    fatbin = options.fatbin
    ptx, log = (fatbin.with_suffix(suffix) for suffix in (".ptx", ".log"))
    run([*options.nvcc, "-MMD", "-MF", f"{fatbin}.d", "-MT", str(fatbin), str(options.source), "-o", str(ptx)])
    if options.ptx_version:
        ptx.write_text(re.sub(r"^\.version .*$", f".version {options.ptx_version}", ptx.read_text(), count=1, flags=re.MULTILINE))
    images, report, architectures = [f"--image3=kind=ptx,sm=80,file={ptx}"], "", options.architectures.split(",")
    for architecture in architectures:
        cubin = fatbin.with_suffix(f".sm_{architecture}.cubin")
        report += run([options.ptxas, "-v", f"-arch=sm_{architecture}", str(ptx), "-o", str(cubin)])
        images.append(f"--image3=kind=elf,sm={architecture},file={cubin}")
    log.write_text(report)
    # "speed" is LZ4, which every driver unpacks; the default takes one as new as the toolkit.
    compression = ["--compress-mode=speed"] if options.ptx_version else []
    run([options.fatbinary, "--64", "--compress-all", *compression, f"--create={fatbin}", *images])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {
        "image": fatbin.stem,
        "seconds": round(used.ru_utime, 2),
        "kilobytes": round(fatbin.stat().st_size / 1024, 1),
        "architectures": len(architectures),
    }
    fatbin.with_suffix(".json").write_text(json.dumps(cost) + "\n")


def run(command: list[str]) -> str:
    """Returns what it wrote."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


if __name__ == "__main__":
    main()
