"""The service: bytes of an image in, a mask out. Imports `model`, never the reverse."""
