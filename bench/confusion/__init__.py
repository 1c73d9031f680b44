"""How often `inspect` and the artifact leg of `run` are right: seeded cases of known truth, as a confusion matrix."""
