"""Benchmarks against torch on the machine at hand, on pytest-benchmark: benchmark_*.py, the `compare` fixture in conftest.py.

These files and host_cost.py, which are run by path, import the package by its name; the others import relatively.
"""

# How `fused-attention bench` calls pytest: conftest.py prints every comparison as it ends, then the tables.
PYTEST_ARGUMENTS = (
    "-q",
    "--override-ini=python_files=benchmark_*.py",
    "--benchmark-only",
    "--benchmark-quiet",
    "-rfE",
    "--benchmark-max-time=0.6",  # seconds for each comparison
)
