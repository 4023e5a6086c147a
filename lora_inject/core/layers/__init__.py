"""How one layer carries adapters, and the table of layer kinds."""
