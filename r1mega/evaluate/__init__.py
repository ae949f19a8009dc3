"""How good a checkpoint is: pass@1 over k samples, pass@k, cons@k, and whether two checkpoints differ."""
