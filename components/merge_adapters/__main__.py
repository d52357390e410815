from components.merge_adapters.merger import MergeAdapters, merge_adapters
from zhllama.stage.run import main

if __name__ == "__main__":
    main(MergeAdapters, merge_adapters)
