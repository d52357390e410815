"""The compiled pipeline on this machine: the part of KFP's format that it uses, steps as processes, an S3 server."""
