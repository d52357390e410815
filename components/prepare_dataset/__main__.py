from components.prepare_dataset.options import PrepareDataset
from components.prepare_dataset.preparer import prepare_dataset
from zhllama.stage.run import main

if __name__ == "__main__":
    main(PrepareDataset, prepare_dataset)
