"""What the ranks of most tests import, once; nothing here may start a thread or a process group."""

import gc

from r1mega import platform

platform.prepare()

import torch._dynamo  # noqa: E402, F401  # what the first optimizer of a process imports

import r1mega.checkpoint.store  # noqa: E402, F401
import r1mega.train.grpo_update  # noqa: E402, F401
import r1mega.train.policy  # noqa: E402, F401

gc.collect()
gc.freeze()  # what is imported stays shared, and no collection of a rank goes through it
