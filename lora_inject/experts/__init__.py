"""Mixtures of experts: which weights are experts, how often each is chosen, and their stacks."""
