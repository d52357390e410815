from components.extend_tokenizer.extender import extend_tokenizer
from components.extend_tokenizer.options import ExtendTokenizer
from zhllama.stage.run import main

if __name__ == "__main__":
    main(ExtendTokenizer, extend_tokenizer)
