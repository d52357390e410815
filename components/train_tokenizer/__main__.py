from components.train_tokenizer.options import TrainTokenizer
from components.train_tokenizer.sentencepiece_trainer import train_tokenizer
from zhllama.stage.run import main

if __name__ == "__main__":
    main(TrainTokenizer, train_tokenizer)
