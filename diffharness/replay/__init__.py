"""The replay: graph nodes recomputed from the very inputs that the engine gave them. Never imports llama_cpp."""
