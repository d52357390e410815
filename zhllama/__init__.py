"""The library: what stages and pipelines are made of. Knows no stage."""
