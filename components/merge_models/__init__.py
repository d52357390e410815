"""Merge models of one shape: between two, or with the difference of two others added (a chat vector).

In:  two hf-models, for a chat vector a third; of one vocabulary, or of vocabularies that extend one another.
Out: an hf-model with the larger vocabulary, and `report.json`: every tensor that changed, and by how much.
"""
