from components.launch_training.launcher import launch_training
from components.launch_training.options import LaunchTraining
from zhllama.stage.run import main

if __name__ == "__main__":
    main(LaunchTraining, launch_training, rest="training")
