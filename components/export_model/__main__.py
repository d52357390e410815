from components.export_model.exporter import export_model
from components.export_model.options import ExportModel
from zhllama.stage.run import main

if __name__ == "__main__":
    main(ExportModel, export_model)
