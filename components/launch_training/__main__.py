from components.launch_training.launcher import LaunchTraining, launch_training
from zhllama.stage.run import main

if __name__ == "__main__":
    main(LaunchTraining, launch_training, rest="training")
