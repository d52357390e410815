from components.pretrain.options import Pretrain
from components.pretrain.pretraining import pretrain
from zhllama.stage.run import main

if __name__ == "__main__":
    main(Pretrain, pretrain)
