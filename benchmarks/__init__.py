"""Programs that measure the service. See README.md."""
