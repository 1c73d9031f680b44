"""One file per architecture: its hyperparameters, then its forward."""
