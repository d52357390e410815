"""Ask a model: one prompt, a file of instructions, or a conversation.

In:  a model (and adapters to merge into it), and what is asked.
Out: a samples artifact, `samples.json` (a list of {"Input", "Output"}); a conversation leaves nothing.
"""
