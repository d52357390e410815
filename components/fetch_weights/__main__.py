from components.fetch_weights.fetcher import FetchWeights, fetch_weights
from zhllama.stage.cli import main

if __name__ == "__main__":
    main(FetchWeights, fetch_weights)
