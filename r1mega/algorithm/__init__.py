"""Pure tensor functions of the recipe: no processes, no models. `advantage`, `grpo` (policy loss and KL), `log_prob`."""
