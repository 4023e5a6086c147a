"""The claims of the LoRA paper, run on real weights: a function for each stage."""
