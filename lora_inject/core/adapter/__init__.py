"""The adapter as a value: tensors and numbers, apart from any model and any file."""
