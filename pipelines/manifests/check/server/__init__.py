"""What a Kubernetes 1.34 API server says to an object: decoding and validation, type by type, as rules of our own (the
OpenAPI schema has neither ranges nor names). Sources: k8s.io/kubernetes pkg/apis/*/validation, and recorded answers."""
