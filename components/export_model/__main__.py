from components.export_model.exporter import ExportModel, export_model
from zhllama.stage.run import main

if __name__ == "__main__":
    main(ExportModel, export_model)
