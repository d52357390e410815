"""`python -m components.pretrain` whose last process is told to stop while it takes a checkpoint.

Its workers are spawned: each imports this module before it trains.
"""

import os
import signal
from typing import Any

from components.pretrain.options import Pretrain
from zhllama.stage.run import main
from zhllama.training import checkpointing
from zhllama.training.stage import run_training as pretrain

take = checkpointing.take


def told_meanwhile(*given: Any) -> Any:
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(*given)


checkpointing.take = told_meanwhile

if __name__ == "__main__":
    main(Pretrain, pretrain)
