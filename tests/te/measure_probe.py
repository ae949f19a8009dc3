"""How far FP8 moves the log-probs that the weight proof probes:  python -m tests.te.measure_probe RUN_OF_A_BASE/hf

Prints, against the same model in bfloat16, quantiles of |difference| (of a log-prob below -4 nats: in proportion, as
`ProbeLimit.allowed`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.te import stand_in


def main(directory: Path) -> None:
    from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
    from r1mega.platform import groups
    from r1mega.train.packing import build_microbatch
    from r1mega.train.policy import Policy
    from r1mega.weights.verify import made_up_sequences

    config = json.loads((directory / "config.json").read_text())
    groups.init_parallel(ParallelConfig(), seed=0)
    sequences = made_up_sequences([32] * 32, config["vocab_size"], seed=0)
    batch = build_microbatch(sequences, [1] * 32, range(32))
    found = {}
    for fp8 in ("off", "tensorwise", "blockwise"):
        model = ModelConfig(path=directory, dtype="bfloat16", fp8=fp8)
        policy = Policy(model, config, ParallelConfig(), OptimizerConfig(), total_steps=1, seed=0)
        policy.load_pretrained(directory)
        found[fp8] = policy.log_probs([batch])[0][0]
    for fp8 in ("tensorwise", "blockwise"):
        scaled = (found[fp8] - found["off"]).abs() / (found["off"].abs() / 4).clamp(min=1)
        print(fp8, {q: round(float(torch.quantile(scaled, q)), 3) for q in (0.5, 0.9, 0.95, 0.99, 1.0)})


if __name__ == "__main__":
    stand_in.install()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
