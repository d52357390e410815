from components.generate_instructions.generator import generate_instructions
from components.generate_instructions.options import GenerateInstructions
from zhllama.stage.run import main

if __name__ == "__main__":
    main(GenerateInstructions, generate_instructions)
