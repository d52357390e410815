"""Readers and servers against input that programs make up: `make fuzz`, outside CI.

Each module has `run(tries, scratch)`, which returns what it counted, or ends with what it found.
"""
