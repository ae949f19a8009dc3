"""What ranks with a trainer and a vLLM engine import, once, in the order of a run; no thread starts here either."""

import gc

import tests.dist.preload  # noqa: F401

import torch._dynamo  # isort: skip
from r1mega.platform import vllm_cpu

vllm_cpu.prepare_environment()

import vllm.v1.engine.llm_engine  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

torch._dynamo.config.disable = False  # until an engine prepares vLLM's environment itself
gc.collect()
gc.freeze()
