"""Programs that measure the service; see README.md."""
