from components.fetch_weights.fetcher import fetch_weights
from components.fetch_weights.options import FetchWeights
from zhllama.stage.run import main

if __name__ == "__main__":
    main(FetchWeights, fetch_weights)
