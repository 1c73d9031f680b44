"""The reference: an independent forward in torch. Never imports llama_cpp."""
