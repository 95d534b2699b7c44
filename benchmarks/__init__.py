"""Benchmarks on the machine at hand, on pytest-benchmark: benchmark_*.py, the `measure_cell` fixture in conftest.py.

These files and host_cost.py, which are run by path, import the package by its name; the others import relatively.
"""
