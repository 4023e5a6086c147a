"""An adapter for each row of a batch."""
