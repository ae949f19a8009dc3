"""What a rank of a job that nobody has joined would hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config.load import load_config
from r1mega.plan.place import as_rank
from r1mega.plan.shapes import ShapesOnly
from r1mega.train.policy import Policy
from r1mega.weights.direct import local_parameters
from r1mega.weights.explain import layouts
from tests.reference import DEEPSEEK


@pytest.mark.parametrize(
    ("mtp", "words"),
    [
        (0.3, ["pp=2", "layers_per_stage=[4,0]"]),
        (0.0, ["pp=2", "layers_per_stage=[4,0]"]),
        (0.3, ["pp=2", "layers_per_stage=[4,0]", "mtp_standalone=true"]),
        (0.3, ["pp=4", "layers_per_stage=[2,2,0,0]", "mtp_standalone=true"]),
        (0.3, ["pp=3", "vpp=2", "layers_per_stage=[0,1,1,1,1,0]", "mtp_standalone=true"]),
    ],
)
def test_a_stage_is_said_to_hold_what_is_built_there(mtp, words):
    """Of the embedding, the final norm and the output layer, where multi-token prediction is built and where it is not."""
    given = [
        "model.path=configs/nano/model",
        f"model.mtp_loss_coefficient={mtp}",
        *(f"parallel.{word}" for word in words),
    ]
    stage = load_config(Path("configs/nano/zero.yaml"), given)
    hf, pp = DEEPSEEK | {"num_nextn_predict_layers": 1}, stage.parallel.pp
    trainer, _ = layouts(stage, hf, pp)
    built = []
    for rank in range(pp):
        with as_rank(stage.parallel, pp, rank), ShapesOnly():
            built.append(set(local_parameters(Policy(stage.model, hf, stage.parallel, seed=0).chunks)))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert trainer.holding_stages(name) == tuple(rank for rank in range(pp) if name in built[rank]), name
