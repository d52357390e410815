"""What a training needs before it is started: memory, time, storage, and whether it fits. Plain arithmetic, no torch.

docs/planning.md has the formulae with their sources; a test holds them against torch's measured peak.
"""
