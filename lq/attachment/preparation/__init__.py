"""Rescale a float model, exactly, so that its activations and weights are easier to quantize."""
