from components.convert_weights.converter import ConvertWeights, convert_weights
from zhllama.stage.run import main

if __name__ == "__main__":
    main(ConvertWeights, convert_weights)
