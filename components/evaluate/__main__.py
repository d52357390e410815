from components.evaluate.evaluate import Evaluate, evaluate
from zhllama.stage.run import main

if __name__ == "__main__":
    main(Evaluate, evaluate)
