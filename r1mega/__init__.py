"""r1mega: reasoning models by the DeepSeek-R1 recipe, on Megatron-core and vLLM in the same processes."""

__version__ = "0.1.0"
