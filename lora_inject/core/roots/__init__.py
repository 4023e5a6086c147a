"""The root of an injected model: what it remembers, and who takes part in its forwards."""
