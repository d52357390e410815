"""`make demo`: the whole adaptation on this machine, at size `tiny`, on real Chinese text.

material.py    fetches the text and makes the instructions
base_model.py  makes the tiny LLaMA in Meta's layout that is adapted
run.py         does the two, runs the compiled pipeline once, and prints what was learnt
"""
