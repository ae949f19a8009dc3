"""Pure tensor functions of the recipe: no processes, no models. `advantage` and `grpo` (policy loss and KL)."""
