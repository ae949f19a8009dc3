"""Weights on disk: HF directories, Megatron's torch_dist checkpoints, and the way between them."""
