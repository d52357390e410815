"""The API client; the training job, the model server, placement, network policies; the reaper."""
