"""Measure a model against the ones it was made from.

In:  a model, its baselines, held-out Chinese and English text, held-out instructions, the trainings' metrics.
Out: a report artifact, `report.json` (every figure; schema in components/evaluate/report.py) and `report.html`.
"""
