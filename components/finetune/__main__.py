from components.finetune.finetuning import finetune
from components.finetune.options import Finetune
from zhllama.stage.run import main

if __name__ == "__main__":
    main(Finetune, finetune)
