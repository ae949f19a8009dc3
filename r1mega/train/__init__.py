"""The policy, its heads, and the updates of both: RL, imitation, preferences."""
