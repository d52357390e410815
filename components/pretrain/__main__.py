from components.pretrain.options import Pretrain
from zhllama.stage.run import main
from zhllama.training.stage import run_training

if __name__ == "__main__":
    main(Pretrain, run_training)
