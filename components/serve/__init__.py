"""Serve a model on this machine behind an OpenAI-compatible API.

In:  a model.
Out: an API (chat completions with streaming, completions, models, health) until it is stopped; with `--ask` one
     answer through that API, and, with a store, a samples artifact with it.
"""
