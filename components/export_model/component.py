"""export_model as a KFP component."""

from kfp import dsl

from components.export_model.options import ExportModel
from zhllama.stage.component import component_of

export_model = component_of(ExportModel, exported=dsl.Model)
