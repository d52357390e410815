"""Benchmarks: each module is one, with `run(scratch) -> list[Table]`; `make bench` runs them and prints the tables.

A benchmark puts our way and its peer side by side in the same run, in programs of their own (measure.py).
"""
