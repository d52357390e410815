"""`make demo`: the whole adaptation on this machine, at size `tiny`, on real Chinese text.

material.py    fetches the text and makes the instructions
base_model.py  makes the tiny LLaMA in Meta's layout that is adapted
show.py        prints what was learnt
run.py         does the three, around one run of the compiled pipeline
"""
