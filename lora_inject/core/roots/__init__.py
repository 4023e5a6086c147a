"""The root of an injected model: what it remembers, and what is asked of it."""
