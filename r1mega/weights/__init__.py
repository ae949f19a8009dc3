"""Trainer -> generator: where each tensor lives, how it gets there, and the proof that it did."""
