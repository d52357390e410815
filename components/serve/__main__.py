from components.serve.serve import run
from components.shared.cli import guarded

if __name__ == "__main__":
    guarded(run)
