"""The stages: one folder, one KFP component, one container image. A stage never imports another."""
