"""Manifests for kubectl apply, and what checks them without a cluster."""
