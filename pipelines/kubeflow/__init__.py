"""Runs on Kubeflow Pipelines: `client` speaks with its API, `answers` tells its errors apart, `runs` and `workflow`
make steps of what the API and the run's Workflow show."""
