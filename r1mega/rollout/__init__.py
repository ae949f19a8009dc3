"""Sampling: the engine protocol, the engines behind it, groups for training, and single samples that are kept."""
