"""Weights of a model by their GGUF names, whatever they are stored in."""
