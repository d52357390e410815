"""`zhllama check`: offline admission. What a cluster would refuse, or accept and regret, said before it is applied.

documents.py reads YAML and keeps line numbers; schema.py holds each object to its schema, strictly; what no
schema says is in job_rules.py (the training operator's webhook, Kueue) and pod_rules.py (the restricted Pod Security
Standard, and our own habits).
"""
