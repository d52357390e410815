"""Artifacts: the manifest and its blocks; reading, writing, copying, caching, verifying."""
