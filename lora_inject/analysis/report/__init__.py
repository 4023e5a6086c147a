"""The report about an adapter: one HTML file that loads nothing from outside."""
