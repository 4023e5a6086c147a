"""From the trainer to the server: proof that an adapter is there; what an environment has."""
