"""`r1mega plan --sbatch`: the submission of a stage, with what a plan knows and a person would have to guess."""

from __future__ import annotations

import math
import shlex

from r1mega.errors import ConfigError
from r1mega.plan.command import Job, Planned

SAVE_BANDWIDTH = 1e9
"""Bytes/s that a node writes of a checkpoint, where no run tells (`--calibrate`). Estimated: no cluster's storage was measured."""
MARGIN = 1.5
"""Of the warning before the end over a step and a save: seconds are a model."""
LEAST_LEAD = 600
MOST_LEAD = 65535
"""Seconds, of `--signal` (Slurm's own limit)."""
START = 1800
"""Seconds until a job's models and generators are there. Estimated."""
DAY = 24 * 3600
"""A job asks for no more than that, or what one step and its warning want: it goes back to the queue by itself."""


def submission(job: Job, planned: Planned) -> str:
    """A script for sbatch, from the repository's root; further overrides may stand behind its name.

    Raises ConfigError for GPUs that are no whole number of machines.
    """
    if job.gpus > job.per_node and job.gpus % job.per_node:
        raise ConfigError(
            f"--sbatch: {job.gpus:,} GPUs are no whole number of machines of {job.per_node}; change --gpus or --gpus-per-node"
        )
    nodes, name = math.ceil(job.gpus / job.per_node), planned.config.stage
    tasks = min(job.gpus, job.per_node)
    step = 0.0 if planned.seconds is None else planned.seconds.total
    measured = None if planned.calibration is None else planned.calibration.save_bandwidth
    save = planned.memory.checkpoint_bytes / nodes / (measured or SAVE_BANDWIDTH)
    wanted = max(LEAST_LEAD, math.ceil(MARGIN * (step + save)))
    lead, steps = min(MOST_LEAD, wanted), getattr(planned.config, "steps", None)
    whole = DAY if planned.seconds is None or steps is None else step * steps
    seconds = math.ceil(max(START + lead + MARGIN * step, min(DAY, START + lead + MARGIN * whole)))
    said = "not planned" if planned.seconds is None else f"planned at {step:,.0f} s, a save at {save:,.0f} s"
    said += "" if measured is None else " by what was measured"
    if wanted > lead:
        said += f"\n# (a warning of {wanted:,} s is wanted and Slurm's longest is {lead:,} s: the step that it meets may be lost)"
    host = sum(planned.memory.host_bytes.values()) / 1e9
    words = shlex.join([str(job.path), *job.overrides])
    return f"""#!/usr/bin/env bash
# Stage {name} on {job.gpus:,} {planned.gpu.name}, written by `r1mega plan --sbatch`: a step is {said},
# host memory at {host:,.0f} GB a node beside the programs themselves.
#   sbatch THIS_FILE [key.sub=value ...]      from the repository's root; see launch/slurm.sh
#SBATCH --job-name=r1mega-{name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={tasks}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={_duration(seconds)}
#SBATCH --requeue
#SBATCH --signal=B:USR1@{lead}
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${{R1MEGA_HOME:-${{SLURM_SUBMIT_DIR:-.}}}}/launch/slurm.sh" || exit 2
run_stage {words} "$@"
"""


def _duration(seconds: int) -> str:
    """As Slurm reads it: days-hours:minutes:seconds."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
