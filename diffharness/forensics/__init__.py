"""What a file's tensors and metadata say, without a forward: artifact against checkpoint."""
