"""The steps, cheapest first: what each proves, what it needs, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """function: 'module:function', called with a Context and a Findings in a process of its own.

    needs: abilities of the machine (see environment.ABILITIES); a step without them is skipped, by name. uses: steps whose
    figures or files it reads; they are run with it. seconds: expected on an H100; limit: when it is ended. on_cpu: the
    step runs on the CPU whatever the device (a reference).
    """

    name: str
    proves: str
    function: str
    seconds: int
    limit: int
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    on_cpu: bool = False


_HERE = "r1mega.gpu_check"

STEPS = (
    Step("environment", "what is installed, and which of it works", f"{_HERE}.environment:describe", 40, 900),
    Step(
        "limits", "rates of a copy and of matrix products, of every device; products are exact",
        f"{_HERE}.limits:measure", 15, 120, ("torch",),
    ),
    Step("kernels-build", "the kernels compile here", f"{_HERE}.kernels:build", 45, 300, ("torch", "compiler")),
    Step(
        "kernels-safe", "no access out of bounds, race or missed barrier in any kernel, by compute-sanitizer",
        f"{_HERE}.inspect_kernels:sanitize", 60, 600, ("gpu", "torch", "sanitizer"), ("kernels-build",),
    ),
    Step(
        "kernels-right", "kernels against float64: values, gradients, extremes, batch invariance",
        f"{_HERE}.kernels:right", 25, 240, ("torch",), ("kernels-build",),
    ),
    Step(
        "kernels-fast", "kernels against the measured limits",
        f"{_HERE}.kernels:fast", 25, 240, ("torch",), ("limits", "kernels-right"),
    ),
    Step(
        "kernels-counted", "ncu's counters of each kernel: shares of bandwidth and compute, occupancy",
        f"{_HERE}.inspect_kernels:profile", 60, 600, ("gpu", "torch", "ncu"), ("kernels-right",),
    ),
    Step(
        "reference", "two steps of a small policy on the CPU, float32: what the device must reproduce",
        f"{_HERE}.policy:make_reference", 30, 600, ("policy",), on_cpu=True,
    ),
    Step(
        "policy-fp32", "log-probs, loss, gradients, two optimizer steps in float32 equal the CPU's",
        f"{_HERE}.policy:fp32", 40, 600, ("policy",), ("reference", "kernels-right"),
    ),
    Step(
        "policy-bf16", "the same in bfloat16 by logits, hidden states and plain torch, within bfloat16's error",
        f"{_HERE}.policy:bf16", 40, 600, ("policy",), ("reference", "kernels-right"),
    ),
    Step(
        "checkpoint", "a checkpoint brings back every bit, and the next step",
        f"{_HERE}.policy:checkpoint", 30, 600, ("policy",), ("reference", "kernels-right"),
    ),
    Step(
        "offload", "weights, gradients and optimizer state leave the device and come back bit by bit",
        f"{_HERE}.policy:offload", 25, 600, ("policy",), ("reference", "kernels-right"),
    ),
    Step(
        "policy-fp8", "FP8 training steps, tensorwise and blockwise, within FP8's error",
        f"{_HERE}.policy:fp8", 60, 600, ("policy", "te", "fp8"), ("reference", "kernels-right"),
    ),
    Step(
        "gpu-tests", "the tests marked `gpu`",
        f"{_HERE}.loop:gpu_tests", 60, 600, ("gpu", "policy", "pytest"), ("kernels-build",),
    ),
    Step(
        "engine", "vLLM builds, takes the policy's weights, sleeps, wakes, generates what the policy computes, closes",
        f"{_HERE}.generator:engine", 120, 900, ("policy", "vllm"), ("reference", "kernels-right"),
    ),
    Step(
        "rl", "the nano base model, then steps of R1-Zero, by the command",
        f"{_HERE}.loop:reinforcement_learning", 180, 1800, ("policy", "vllm", "stages"), ("engine",),
    ),
    Step(
        "transport", "collectives and batched messages between all devices: right bytes, and their rate",
        f"{_HERE}.ranks:transport", 30, 300, ("policy", "2 devices"),
    ),
    Step(
        "parity", "TP 2, EP 2, ETP 2, PP 2: log-probs, loss, gradients and weights equal one rank's",
        f"{_HERE}.ranks:parity", 90, 900, ("policy", "2 devices"), ("reference", "kernels-right"),
    ),
    Step(
        "parity-4", "the same over four devices, with CP and interleaved PP",
        f"{_HERE}.ranks:parity_of_four", 90, 900, ("policy", "4 devices"), ("reference", "kernels-right"),
    ),
    Step(
        "reshard", "a policy over two devices into vLLM over one and over two: digests and log-probs",
        f"{_HERE}.ranks:reshard", 180, 1800, ("policy", "vllm", "2 devices"), ("reference", "engine"),
    ),
)  # fmt: skip


def select(only: tuple[str, ...], skip: tuple[str, ...]) -> list[Step]:
    """The steps of these names and those that they use, in order; without `only` all. ValueError for unknown names."""
    known = {step.name: step for step in STEPS}
    unknown = [name for name in (*only, *skip) if name not in known]
    if unknown:
        raise ValueError(f"no step is called {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = set(only) or set(known)
    for step in reversed(STEPS):
        if step.name in wanted:
            wanted.update(step.uses)
    wanted.add("environment")
    return [step for step in STEPS if step.name in wanted and step.name not in skip]
