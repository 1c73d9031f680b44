"""llama.cpp, in a worker process. Never imports torch."""
