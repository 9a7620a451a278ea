"""Renders the Helm chart and tests it on a real Kubernetes API server (`make kube-test`)."""
