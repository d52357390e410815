from components.merge_models.merger import merge_models
from components.merge_models.options import MergeModels
from zhllama.stage.run import main

if __name__ == "__main__":
    main(MergeModels, merge_models)
