"""Differential runs of GGUF models: llama.cpp against an independent forward, on the same tokens.

This package imports nothing on its own account: the engine worker loads single modules of it
under interpreters that have only numpy and llama_cpp.
"""

__version__ = "0.1.0"
