from components.generate.generate import run
from zhllama.stage.program import guarded

if __name__ == "__main__":
    guarded(run)
