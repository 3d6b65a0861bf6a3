"""Synthetic street scenes with known ground truth, and the demo network that was trained on them."""
