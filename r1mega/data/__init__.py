"""Prompts, preferences, texts to imitate: read, checked, rendered, tokenised, drawn."""
