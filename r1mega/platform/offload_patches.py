"""Changes to megatron-core's offloading of activations (`model.offload_modules`)."""

from __future__ import annotations

from r1mega.platform.megatron_patch import Patch

_FP8_COPIES = "copies of weights in FP8 would go to host memory and come back as bfloat16, in each microbatch"
_KNOWS_COPIES = (
    "none known; it would have to tell Transformer Engine, which marks them only while its own offloading is on"
)
_PLANS_ONCE = (
    "none known; it would have to take a plan for each number of microbatches, and a pool for each shape of tensors"
)


OFFLOAD_PATCHES = (
    Patch(
        "pipeline_parallel.schedules",
        "always",
        "    if not forward_only and config.fine_grained_activation_offloading:\n        off_interface.reset()",
        "    if config.fine_grained_activation_offloading:\n        off_interface.reset_instance()",
        "each pass has microbatches of other numbers and lengths: those of the first are no plan for the next",
        f"{_PLANS_ONCE}; 0.19 has another text: see below",
        count=3,
        fixed_in="0.19",
    ),
    Patch(
        "pipeline_parallel.schedules",
        "always",
        "'fine_grained_activation_offloading', False):\n        off_interface.reset()",
        "'fine_grained_activation_offloading', False):\n        off_interface.reset_instance()",
        "as above",
        _PLANS_ONCE,
        count=3,
        since="0.19",
    ),
    Patch(
        "pipeline_parallel.fine_grained_activation_offload",
        "always",
        "self.use_cpu_pool = True",
        "self.use_cpu_pool = False",
        "as above: its pool keeps memory of each shape, and gives it away before it is read; torch's pinned memory does neither",
        _PLANS_ONCE,
    ),
    Patch(
        "pipeline_parallel.fine_grained_activation_offload",
        "always",
        '        if hasattr(tensor, "offloading_activation") and not tensor.offloading_activation:',
        '        if not getattr(tensor, "offloading_activation", True) or type(tensor) is not torch.Tensor:',
        _FP8_COPIES,
        f"{_KNOWS_COPIES}; 0.19 has another text: see below",
        fixed_in="0.19",
    ),
    Patch(
        "pipeline_parallel.fine_grained_activation_offload",
        "always",
        "        if _te_do_not_offload(tensor):",
        "        if _te_do_not_offload(tensor) or type(tensor) is not torch.Tensor:",
        _FP8_COPIES,
        _KNOWS_COPIES,
        since="0.19",
    ),
    Patch(
        "pipeline_parallel.fine_grained_activation_offload",
        "cpu",
        'tensor.device.type == "cuda"',
        "True",
        "tensors of the device, here the CPU, are offloaded as those of a GPU are",
        "none known; it would have to ask what device it runs on",
        since="0.19",
    ),
)
