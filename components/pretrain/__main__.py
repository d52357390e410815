from components.pretrain.pretraining import Pretrain, pretrain
from zhllama.stage.run import main

if __name__ == "__main__":
    main(Pretrain, pretrain)
