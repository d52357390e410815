"""zhllama's commands, one module a subject.

`add_to(commands)` declares a module's commands; each imports what it needs when it runs.
"""
