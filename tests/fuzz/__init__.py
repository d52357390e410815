"""Readers and servers against input that programs make up: `make fuzz`, outside CI.

`gateway`: requests, which schemathesis makes. All others are readers of files (readers.py), each in a process of
its own (loop.py) under coverage-guided atheris. A file that a reader fell over is kept in corpus/<reader>/ when that is
mended: test_corpus.py reads them all again.
"""
