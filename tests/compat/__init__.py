"""`make compat`: what programs that nobody here wrote make of our folders, adapters and GGUF, and we of theirs.

Not part of the test suite: it installs each program into a virtual environment of its own.
"""
