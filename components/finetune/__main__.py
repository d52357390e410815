from components.finetune.finetuning import Finetune, finetune
from zhllama.stage.run import main

if __name__ == "__main__":
    main(Finetune, finetune)
