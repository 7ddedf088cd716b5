"""What is learned on the way: widths by the noise scale, and distillation from the float model."""
