#!/usr/bin/env bash
# The main job on one CPU machine: set up, make a nano base model, train it by GRPO straight from the base, report.
#
#   bash launch/quickstart.sh [key.sub=value ...]      overrides of configs/nano/zero.yaml
#
# SEED (default 1) is the seed of base and RL; RUNS (default runs/nano) is where the runs go. Started again it installs
# nothing twice and goes on where it was cut short.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up
SEED=${SEED:-1}
RUNS=${RUNS:-runs/nano}

say "1/3  base model: pre-training from scratch on the nano corpus"
r1mega train configs/nano/base.yaml seed="$SEED" run_dir="$RUNS/base"
say "2/3  stage zero: GRPO straight from the base"
r1mega train configs/nano/zero.yaml seed="$SEED" run_dir="$RUNS/zero" model.path="$RUNS/base/hf" \
    data.prompts="[$RUNS/base/data/train.jsonl]" evaluate.data="$RUNS/base/data/eval.jsonl" "$@"
say "3/3  report"
REPORT=$(r1mega report "$RUNS/zero")
"$PYTHON" - "$RUNS/zero" "$REPORT" <<'PY'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
before, after = evaluations[0], evaluations[-1]
print(f"accuracy on {after['eval/prompts']:.0f} fresh problems: {before['eval/accuracy']:.3f} -> {after['eval/accuracy']:.3f}")
print(f"response length: {before['eval/length_mean']:.1f} -> {after['eval/length_mean']:.1f} tokens")
print(f"last step: accuracy {last['reward/accuracy']:.3f}, trainer against sampler {last['logprob/diff_max']:.1e} nats at most")
print(f"report: {pathlib.Path(sys.argv[2]).resolve()}")
PY
