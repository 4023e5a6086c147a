"""What is asked and what it means: names, sites, configs and plans, without torch."""
