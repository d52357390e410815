from components.evaluate.evaluate import evaluate
from components.evaluate.options import Evaluate
from zhllama.stage.run import main

if __name__ == "__main__":
    main(Evaluate, evaluate)
