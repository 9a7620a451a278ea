"""`unet bench`: measure this machine, its peak, an engine against it, and the service."""
