"""What other frameworks ask of an adapted model, one file for each framework."""
