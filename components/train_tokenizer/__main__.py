from components.shared.cli import main
from components.train_tokenizer.sentencepiece_trainer import TrainTokenizer, train_tokenizer

if __name__ == "__main__":
    main(TrainTokenizer, train_tokenizer, packages=("sentencepiece",))
