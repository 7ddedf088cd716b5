"""What a model is: its tensors, calls and samples, found by running it once; no quantizer in sight."""
