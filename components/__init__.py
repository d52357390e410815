"""The stages: one folder, one KFP component, one container image. A stage never imports another."""

import os
import signal

# A container's first process gets no signal that it has no handler for: a cancel while it imported was lost, and the
# training went on. So before anything else is imported, and until the command's own handler takes its place.
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
