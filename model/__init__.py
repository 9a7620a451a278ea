"""The network, its transforms, training and evaluation. Knows no HTTP and never imports `app`."""
