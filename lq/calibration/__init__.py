"""Ranges from data: of each tensor alone, by the loss of the network, or from images made of nothing."""
