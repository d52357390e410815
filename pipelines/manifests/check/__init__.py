"""`zhllama check`: offline admission. What a cluster would refuse, or accept and regret, said before it is applied.

documents.py reads YAML and keeps line numbers; schema.py holds each object to its schema, strictly; rules.py holds
what no schema says: the training operator's webhook, the restricted Pod Security Standard, Kueue, and our own habits.
"""
