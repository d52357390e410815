from components.extend_tokenizer.extender import ExtendTokenizer, extend_tokenizer
from zhllama.stage.run import main

if __name__ == "__main__":
    main(ExtendTokenizer, extend_tokenizer)
