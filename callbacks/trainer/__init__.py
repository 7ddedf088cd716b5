"""What the callbacks share in dealing with a Trainer: its data, steps, optimizers, checkpoints and averages."""
