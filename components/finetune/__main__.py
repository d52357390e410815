from components.finetune.options import Finetune
from zhllama.stage.run import main
from zhllama.training.stage import run_training

if __name__ == "__main__":
    main(Finetune, run_training)
