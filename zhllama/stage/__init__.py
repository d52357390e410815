"""What makes a function a stage: options, command line, cache key, run, exit codes, logging."""
