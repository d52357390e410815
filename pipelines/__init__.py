"""The pipeline and what runs it: compile, submit, render, plan, check, and the local runner."""
