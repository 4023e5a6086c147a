"""Bytes on disk: safetensors, strict JSON, atomic writes, and the rows of a tensor."""
