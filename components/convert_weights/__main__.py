from components.convert_weights.converter import convert_weights
from components.convert_weights.options import ConvertWeights
from zhllama.stage.run import main

if __name__ == "__main__":
    main(ConvertWeights, convert_weights)
