"""The verbs on a live model; the model is the only state."""
