from components.merge_adapters.merger import merge_adapters
from components.merge_adapters.options import MergeAdapters
from zhllama.stage.run import main

if __name__ == "__main__":
    main(MergeAdapters, merge_adapters)
