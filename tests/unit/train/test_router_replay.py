"""Experts that are given: of samples, or of the pass that computed the old log-probs."""

import dataclasses

import numpy as np
import pytest
import torch

from r1mega import platform
from r1mega.config.schema import ModelConfig
from r1mega.config.stages.rl import AlgorithmConfig
from tests.unit.train.tiny_policy import TEMPERATURE, make_samples, make_trainer, transformers_model

pytestmark = pytest.mark.heavy

platform.prepare()


@pytest.mark.parametrize("own", [True, False])
def test_router_replay_equals_transformers_told_to_take_those_experts(one_rank, tmp_path, own):
    """own: the experts that the routers would choose anyway; otherwise any."""
    from r1mega.train.samples import pack_samples

    policy = make_trainer().policy
    model = transformers_model(policy, tmp_path)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    generator = np.random.default_rng(3)
    samples, expected = [], []
    for sample in make_samples():
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        chosen = [generator.permuted(np.tile(np.arange(8), (ids.numel(), 1)), axis=1)[:, :4] for _ in gates]
        hooks = [gate.register_forward_hook(_taking(chosen, i, own)) for i, gate in enumerate(gates)]
        with torch.no_grad():
            logits = model(ids).logits[0] / TEMPERATURE
        for hook in hooks:
            hook.remove()
        picked = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        expected.append(picked[sample.prompt_length - 1 :])
        routed = np.stack(chosen, axis=1)[:-1].astype(np.uint8)
        samples.append(dataclasses.replace(sample, routed_experts=routed))
    order = [2, 0, 3, 1]
    packs = [pack_samples(samples, order[:3]), pack_samples(samples, order[3:])]
    found = torch.cat(policy.log_probs(packs, TEMPERATURE))
    assert (found - torch.cat([expected[i] for i in order])).abs().max() <= 1e-5
    packs = [pack_samples(samples, order)]
    unguided = policy.scores(packs, TEMPERATURE, replay=False)[0].values
    assert ((found - unguided).abs().max() <= 1e-5) == own
    routers = [m for c in policy.chunks for m in c.modules() if hasattr(m, "router_replay")]
    assert all(router.router_replay.router_replay_action is None for router in routers)


@pytest.mark.parametrize("repeats", [True, False])
def test_an_update_repeats_the_experts_of_its_log_prob_pass(one_rank, repeats):
    """R2: in the second optimizer step the routers would choose otherwise."""
    from r1mega.config.schema import DataConfig
    from r1mega.config.stages.rl import RLStage, UpdateConfig
    from r1mega.observe.trace import PhaseTimer
    from r1mega.train.grpo_update import update_policy

    trainer, taken = make_trainer(lr=0.05), []
    for chunk in trainer.policy.chunks:
        for router in chunk.modules():
            if hasattr(router, "router_replay"):
                router.register_forward_hook(
                    lambda _router, _inputs, outputs: taken.append(outputs[1].nonzero().tolist())
                )
    config = RLStage(
        stage="zero", run_dir="unused", model=ModelConfig(path="unused"), data=DataConfig(prompts=()),
        update=UpdateConfig(num_minibatches=2, microbatch_tokens=64),
        algorithm=AlgorithmConfig(router_replay=repeats, kl_coefficient=0.1),
    )  # fmt: skip
    trainer.policy.take_reference()
    update_policy(trainer, make_samples(), config, 1, PhaseTimer())
    layers, updates = 2, 2
    assert len(taken) == 3 * layers * updates  # old, reference, update
    old, reference, updated = taken[:4], taken[4:8], taken[8:]
    assert old == reference and old[:2] == updated[:2]  # the weights are still the same
    assert (old == updated) == repeats


def _taking(chosen, index, own):
    """A hook that makes a router of transformers take chosen[index]; own: one that writes down what it took."""

    def hook(gate, inputs, outputs):
        logits, weights, indices = outputs
        if own:
            chosen[index] = indices.numpy()  # [tokens, top-k]
            return outputs
        indices = torch.from_numpy(chosen[index])
        weights = logits.sigmoid().gather(1, indices)
        return logits, weights / weights.sum(-1, keepdim=True) * 2.5, indices

    return hook
