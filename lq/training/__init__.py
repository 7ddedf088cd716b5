"""What is learned on the way: widths by the noise scale, distillation from the float model; weights that oscillate."""
