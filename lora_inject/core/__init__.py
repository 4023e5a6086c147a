"""What LoRA is here: config, arithmetic, layers, verbs. It imports no room beside it."""
