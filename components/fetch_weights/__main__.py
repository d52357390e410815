from components.fetch_weights.fetcher import FetchWeights, fetch_weights
from zhllama.stage.run import main

if __name__ == "__main__":
    main(FetchWeights, fetch_weights)
