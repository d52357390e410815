"""Models that are loaded to generate or to score."""
