"""Quantizers on a model: where they sit, how they are put there and taken off, and what they make of it."""
