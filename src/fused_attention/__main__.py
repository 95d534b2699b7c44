"""`python -m fused_attention`, the same as the command `fused-attention`."""

from __future__ import annotations

import sys

from .transformer.translation.cli import main

if __name__ == "__main__":
    sys.exit(main())
