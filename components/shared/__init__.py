"""What two or more stages need. Nothing here knows a stage, and nothing heavy (torch, transformers) is imported at
the top of a module that a command line or the launcher loads."""
