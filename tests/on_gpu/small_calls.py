"""Every feature once, forward and backward, on the CUDA and the Triton kernels, small: for compute-sanitizer.

compute-sanitizer python tests/on_gpu/small_calls.py FILE       calls that FILE names are left out; a finished one is added
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from attention_calls import CALL, FEATURES, build, run  # noqa: E402

from fused_attention.kernels.native import cuda as cuda_backend  # noqa: E402
from fused_attention.kernels.triton import backend as triton_backend  # noqa: E402

BACKENDS = {"cuda": cuda_backend, "triton": triton_backend}
HEAD_DIMS = {"cuda": (64, 128), "triton": (64,)}


def main() -> None:
    file = Path(sys.argv[1])
    done = file.read_text().splitlines() if file.exists() else []
    for name, backend in BACKENDS.items():
        for head_dim in HEAD_DIMS[name]:
            for feature, call in FEATURES.items():
                line = f"{name}, head_dim {head_dim}: {feature}"
                problem, dout, dlse = build(CALL | call | {"dtype": torch.bfloat16, "head_dims": (head_dim, head_dim)}, "cuda")
                if line in done or backend.unsupported_reasons(problem):
                    continue
                print(line, flush=True)  # above what the sanitizer says of it
                run(backend, problem, dout, dlse)
                torch.cuda.synchronize()
                with file.open("a") as lines:
                    print(line, file=lines)


if __name__ == "__main__":
    main()
