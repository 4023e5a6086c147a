"""From the trainer to the server: proof that an adapter is there; an adapter in memory."""
