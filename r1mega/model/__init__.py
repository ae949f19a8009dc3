"""HF config -> Megatron-core GPTModel, for any parallel layout."""
