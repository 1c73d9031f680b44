"""The architectures whose names and hyperparameters are known, by `general.architecture`."""
