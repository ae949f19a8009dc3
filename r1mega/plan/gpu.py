"""GPUs that a plan can be made for: their memory and speeds, each with its source, and what a program reaches of them."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GPU:
    """memory_bytes: as torch.cuda.get_device_properties tells. Speeds of one GPU: FLOP/s of dense matrix products in
    bfloat16 and FP8 (None: it has none), bytes/s of its memory, and each direction of NVLink, of the network and of PCIe (16 lanes) to host memory.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp8_flops: float | None
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float


NODE_BYTES = 2.166e12
"""Host memory of a node: the 2 TiB of a DGX A100, H100, H200 or B200, of which the kernel keeps one or two percent. Estimated:
no node was asked. The default of --host-memory."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The four constants. matmul: of a GPU's peak, in the trainer; network: of its links; memory: of its memory's
    bandwidth, in decoding and in Adam; overhead_seconds: of a decoding step, beside its bytes and what its ranks wait for each
    other: scheduling, sampling, starting kernels. The first and the last are fitted by tools/plan_back_test.py.
    """

    matmul: float = 0.63
    network: float = 0.5
    memory: float = 0.7
    overhead_seconds: float = 0.022


ASSUMED = Efficiency()

KINDS = {  # PCIe: 5.0, of A100 4.0
    gpu.name: gpu
    for gpu in (
        # NVIDIA H100 data sheet (SXM): 3.35 TB/s, NVLink 900 GB/s both directions together, 989.4 and 1,978.9 TFLOP/s
        # without sparsity; DGX H100: a ConnectX-7 of 400 Gb/s a GPU. Memory: torch shows 79.1 GiB of the 80.
        GPU("h100-80", 79.1 * 2**30, 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9, 64e9),
        # NVIDIA H200 data sheet: 141 GB at 4.8 TB/s, else as H100. Memory: torch shows 139.8 GiB.
        GPU("h200", 139.8 * 2**30, 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9, 64e9),
        # H800: H100 with NVLink 400 GB/s both directions together (DeepSeek-V3 report, section 3.1: 160 GB/s one way)
        GPU("h800", 79.1 * 2**30, 989.4e12, 1978.9e12, 3.35e12, 160e9, 50e9, 64e9),
        # NVIDIA H20: 96 GB at 4.0 TB/s, 148 and 296 TFLOP/s, NVLink 900 GB/s. Memory: 95 GiB of it.
        GPU("h20", 95.1 * 2**30, 148e12, 296e12, 4.0e12, 450e9, 50e9, 64e9),
        # NVIDIA A100 data sheet (SXM, 80 GB): 2.04 TB/s, 312 TFLOP/s, NVLink 600 GB/s; DGX A100: 200 Gb/s a GPU
        GPU("a100-80", 79.2 * 2**30, 312e12, None, 2.04e12, 300e9, 25e9, 32e9),
        # NVIDIA DGX B200: 180 GB usable at 7.7 TB/s, 2,250 and 4,500 TFLOP/s, NVLink 1.8 TB/s both directions together
        GPU("b200", 178.3 * 2**30, 2250e12, 4500e12, 7.7e12, 900e9, 50e9, 64e9),
    )
}


def gpu_kind(name: str) -> GPU:
    """By its name here. Raises ConfigError, naming those that are known."""
    if name not in KINDS:
        raise ConfigError(f"--gpu {name}: not one of {', '.join(KINDS)}")
    return KINDS[name]
