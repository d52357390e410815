from components.serve.serve import run
from zhllama.stage.program import guarded

if __name__ == "__main__":
    guarded(run)
