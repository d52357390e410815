from components.generate_instructions.generator import GenerateInstructions, generate_instructions
from zhllama.stage.run import main

if __name__ == "__main__":
    main(GenerateInstructions, generate_instructions)
