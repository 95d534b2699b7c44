"""Benchmarks against torch on the machine at hand, on pytest-benchmark: benchmark_*.py, the `compare` fixture in conftest.py."""

# How `fused-attention bench` calls pytest: only the table of report.py is shown, the run is saved in ./.benchmarks.
PYTEST_ARGUMENTS = (
    "-q",
    "--override-ini=python_files=benchmark_*.py",
    "--benchmark-only",
    "--benchmark-quiet",
    "--benchmark-autosave",
    "--benchmark-max-time=0.6",  # seconds for each comparison
)
