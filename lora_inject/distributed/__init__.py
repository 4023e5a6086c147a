"""Models whose tensors are spread over processes."""
