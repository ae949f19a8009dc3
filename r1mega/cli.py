"""The `r1mega` command: thin calls into the packages. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from r1mega import ending
from r1mega.arguments import ConfigPath, Overrides, Quiet, Redo, expanded_path, path_option, positive
from r1mega.errors import ConfigError, FreshProcessNeeded
from r1mega.loading import uncollected
from r1mega.noise import silence
from r1mega.plan.gpu import NODE_BYTES

app = typer.Typer(
    name="r1mega",
    help="Reasoning models by the DeepSeek-R1 recipe, on Megatron-core and vLLM in the same processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
reward_app = typer.Typer(help="Score lines of JSON from standard input.", no_args_is_help=True)
app.add_typer(reward_app, name="reward")
reshard_app = typer.Typer(help="Weights from the trainer's layout to the generator's.", no_args_is_help=True)
app.add_typer(reshard_app, name="reshard")


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(help="start so many of it on this machine, as torchrun does")] = None,
    quiet: Quiet = False,
) -> None:
    """Run one stage, from wherever an earlier start left it. Also under torchrun and srun."""
    if ranks is not None:
        ending.leave(_train_on_ranks(config, overrides or [], ranks))
    ending.requeue_on_signals()
    from r1mega.config.load import load_config
    from r1mega.config.validate import validate
    from r1mega.data.prompts import scan_data

    loaded = load_config(config, overrides or [])
    validate(loaded)
    scan_data(loaded)
    with uncollected():  # from here on torch is imported: what is wrong with the files is told before, at once
        from r1mega.observe.progress import tell
        from r1mega.platform.launcher import adopt_launcher_environment, restart
        from r1mega.platform.validate import validate_platform
        from r1mega.stages import run_stage

    adopt_launcher_environment()
    validate_platform(loaded)
    try:
        code = run_stage(loaded)
    except FreshProcessNeeded:
        if ending.is_first_rank():
            tell("starting anew for the next generator: one a process")
        restart()
    ending.leave(code)


def _train_on_ranks(path: Path, overrides: list[str], ranks: int) -> int:
    """The exit code; again by itself where a rank died that was not asked to stop, and there is something new to go on from."""
    ending.requeue_on_signals()  # before the ranks and between two starts of them
    from r1mega.config.load import load_config
    from r1mega.config.validate import validate
    from r1mega.data.prompts import scan_data
    from r1mega.observe.restarts import seconds_until_restart

    config = load_config(path, overrides)
    validate(config, ranks)
    scan_data(config)
    # this imports torch: what is wrong with the files is told before, at once
    from r1mega.platform.local_ranks import run_ranks

    asked = threading.Event()
    while True:
        code = run_ranks(["-m", "r1mega", "train", str(path), *overrides], ranks, asked)
        wait = None if asked.is_set() else seconds_until_restart(config.run_dir, code, config.restart)
        if wait is None:
            ending.exit_on_signals(code)
            return code
        print(f"exit code {code}, and a newer checkpoint: starting again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


@app.command()
def pipeline(
    config: ConfigPath,
    overrides: Annotated[list[str] | None, typer.Argument(help="dir=..., node.key.sub=value ...")] = None,
    first: Annotated[str | None, typer.Option("--from", help="the first node to look at")] = None,
    last: Annotated[str | None, typer.Option("--until", help="the last one")] = None,
    only: Annotated[str | None, typer.Option(help="this one alone")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run and why; write nothing")] = False,
    gpu: Annotated[str, typer.Option(help="that a dry run is for: h100-80, h200, ..., see plan")] = "h100-80",
    redo: Redo = False,
    launcher: Annotated[str, typer.Option(help="command that starts a node's ranks, such as 'srun'")] = "",
    rank_python: Annotated[str | None, typer.Option(help="its interpreter there; default: this one")] = None,
    list_jobs: Annotated[
        bool, typer.Option("--jobs", help="what is to run, a line each, for scripts; hashes of inputs are kept")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run the stages of a pipeline file, each from wherever an earlier start left it."""
    from r1mega.config.pipeline import load_pipeline

    loaded = load_pipeline(config, overrides or [])
    from r1mega.stages import pipeline as stages

    names = stages.select(loaded, first, last, only)
    if dry_run or list_jobs:
        decisions = stages.dry_run(loaded, names, redo=redo, remember=list_jobs, gpu=gpu)
        typer.echo("\n".join((stages.jobs if list_jobs else stages.describe)(loaded, decisions)))
        raise typer.Exit
    raise typer.Exit(stages.run_pipeline(loaded, names, redo=redo, launcher=launcher, rank_python=rank_python))


@app.command()
def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(help="node.key.sub=value ..., over configs/nano")] = None,
    stage: Annotated[str, typer.Option(help="the last stage to run; zero: R1-Zero only")] = "evaluate",
    directory: Annotated[Path, typer.Option("--dir", parser=expanded_path, help="where the runs go")] = Path(
        "runs/nano"
    ),
    seed: Annotated[int, typer.Option(min=0, help="of every stage")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run and why; write nothing")] = False,
    redo: Redo = False,
    quiet: Quiet = False,
) -> None:
    """The whole recipe with a small model on this machine, and a report. Started again it goes on where it was."""
    from r1mega.config.pipeline import NANO, load_pipeline, shipped_configs

    here = shipped_configs()
    given = [f"dir={json.dumps(str(directory), ensure_ascii=False)}", f"overrides.seed={seed}", *(overrides or [])]
    loaded = load_pipeline(here / "r1.yaml", given, {NANO: here})
    from r1mega.stages import pipeline as stages

    names = stages.select(loaded, None, stage, None, last_option="--stage")
    if dry_run:
        typer.echo("\n".join(stages.describe(loaded, stages.dry_run(loaded, names, redo=redo))))
        raise typer.Exit
    raise typer.Exit(stages.run_pipeline(loaded, names, redo=redo))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(parser=expanded_path, help="also check what this config would use")
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="look at the config as if started on so many")] = None,
    gpu: Annotated[str, typer.Option(help="of this kind, see plan")] = "h100-80",
    patches: Annotated[bool, typer.Option("--patches", help="only list the changes made to megatron-core")] = False,
) -> None:
    """Tell what this machine has, and what a config would use of it. Fails when the config could not run here."""
    from r1mega.doctor import run_doctor

    raise typer.Exit(run_doctor(config, overrides or [], patches=patches, gpus=gpus, gpu=gpu))


@app.command("check-nodes")
def check_nodes(
    run_dir: Annotated[Path | None, path_option("also write and read there, where a run will")] = None,
    slow: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="a speed below this share of the job's median is a problem; 0.85; on CPUs 0.5, and a note",
        ),
    ] = None,
    free_gb: Annotated[float, typer.Option(min=0, help="wanted free for run_dir")] = 0.0,
    ranks: Annotated[int | None, typer.Option(help="start so many of it on this machine, as torchrun does")] = None,
) -> None:
    """Whether the machines of a job are fit for it, and equal. Under srun or torchrun, a process a GPU. Fails when one is not."""
    if ranks is not None:
        from r1mega.platform.local_ranks import run_ranks

        given = ["--free-gb", str(free_gb), *(["--slow", str(slow)] if slow is not None else [])]
        given += ["--run-dir", str(run_dir)] if run_dir else []
        raise typer.Exit(run_ranks(["-m", "r1mega", "check-nodes", *given], ranks))
    from r1mega.check_nodes import run_check

    raise typer.Exit(run_check(run_dir, slow=slow, free_gb=free_gb))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of the job; 8; of a pipeline, the nodes' own")] = None,
    gpu: Annotated[str, typer.Option(help="h100-80, h200, h800, h20, a100-80 or b200")] = "h100-80",
    mean: Annotated[
        float | None, typer.Option(min=1, help="tokens of a response on average; default: a quarter of the longest")
    ] = None,
    cv: Annotated[float, typer.Option(min=0, max=10, help="standard deviation of lengths over their mean")] = 0.8,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 256,
    lengths: Annotated[Path | None, path_option("tokens of responses, one number a line, instead")] = None,
    imbalance: Annotated[float, typer.Option(min=1, help="tokens of the fullest expert rank over the mean")] = 1.5,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="8; of a pipeline, its ranks_per_machine")] = None,
    host_memory: Annotated[
        float, typer.Option(min=1, help="GB of a node; 2 TiB but for the kernel's part")
    ] = NODE_BYTES / 1e9,
    search: Annotated[bool, typer.Option("--search", help="propose the fastest layouts that fit")] = False,
    calibrate: Annotated[Path | None, path_option("a run directory: its measured phases set the seconds")] = None,
    sbatch: Annotated[Path | None, path_option("write a submission for Slurm there")] = None,
    samples: Annotated[
        list[str] | None, typer.Option(help="of a pipeline's node: NODE=N samples to train on, or responses to draw")
    ] = None,
) -> None:
    """Memory of every phase of a stage on GPUs that need not be there; of a pipeline, GPU hours. Starts no process. Fails when
    it does not fit.
    """
    from r1mega.plan.command import Job, is_pipeline, plan_lines, sample_counts, search_lines
    from r1mega.plan.workload import Lengths

    for name, value in (("mean", mean), ("imbalance", imbalance), ("host-memory", host_memory)):
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"--{name} {value}: wants a number")
    if search and sbatch is not None:
        raise ConfigError("--sbatch is for one layout: plan what --search proposes with it")
    if sbatch is not None and (sbatch.is_dir() or not sbatch.absolute().parent.is_dir()):
        raise ConfigError(f"--sbatch {sbatch}: wants the name of a file in a directory that is there")
    drawn = Lengths(mean, cv, prompt=prompt)
    job = Job(
        config, overrides or [], gpus or 8, gpu, drawn, imbalance, gpus_per_node or 8, lengths, calibrate, host_memory * 1e9
    )  # fmt: skip
    counts = sample_counts(samples or [])
    if is_pipeline(config):
        from r1mega.plan.recipe import recipe_lines

        if search or sbatch is not None:
            raise ConfigError(f"{config}: --search and --sbatch are for the config of one stage; this is a pipeline")
        if gpus is not None or gpus_per_node is not None:
            raise ConfigError(
                f"{config}: --gpus and --gpus-per-node are for the config of one stage, and a pipeline says its own: set "
                "nodes.NAME.ranks and ranks_per_machine there"
            )
        lines, fits = recipe_lines(config, overrides or [], job, counts)
    elif counts:
        raise ConfigError(f"{config}: --samples is for the nodes of a pipeline, and this is a stage")
    elif search:
        lines, fits = search_lines(job, lambda line: typer.echo(line, err=True))
    else:
        lines, planned = plan_lines(job)
        fits = planned.fits
    typer.echo("\n".join(lines))
    if sbatch is not None and fits:
        from r1mega.plan.submission import submission

        sbatch.write_text(submission(job, planned))
    elif sbatch is not None:
        typer.echo(f"--sbatch {sbatch}: not written: it does not fit")
    raise typer.Exit(0 if fits else 1)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(parser=expanded_path, help="a run directory, or a pipeline's")],
) -> None:
    """Write report.html there: one file that opens without network."""
    from r1mega.observe.pipeline_report import PIPELINE_FILE, write_pipeline_report
    from r1mega.observe.report import write_report

    typer.echo((write_pipeline_report if (run_dir / PIPELINE_FILE).exists() else write_report)(run_dir))


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(parser=expanded_path, help="an HF directory or a run directory")],
    prompt: Annotated[str, typer.Argument(help="the question")],
    num_samples: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int | None = None,
    seed: int = 0,
    template: Annotated[str | None, typer.Option(help="default: the run's own")] = None,
) -> None:
    """Sample responses to one question."""
    from r1mega.evaluate.run import generate_text

    texts = generate_text(
        checkpoint, prompt, num_samples=num_samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens,
        seed=seed, template=template,
    )  # fmt: skip
    typer.echo("\n\n".join(texts))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(parser=expanded_path, help="an HF directory or a run directory")],
    data: Annotated[
        Path, typer.Argument(parser=expanded_path, help="a prompt file (JSONL, Parquet, ...), see docs/data.md")
    ],
    num_samples: Annotated[int, typer.Option(help="k: pass@1 is the mean over k samples, cons@k the majority")] = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int | None = None,
    num_prompts: Annotated[int | None, typer.Option(help="only the first so many")] = None,
    template: Annotated[str | None, typer.Option(help="default: the run's own")] = None,
    seed: int = 0,
    output: Annotated[Path | None, path_option("write every sample and verdict here (JSON)")] = None,
) -> None:
    """pass@1 over k samples, with its interval, and cons@k."""
    from r1mega.evaluate.run import evaluate_checkpoint
    from r1mega.evaluate.table import format_table

    result = evaluate_checkpoint(
        checkpoint, data, num_samples=num_samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens,
        num_prompts=num_prompts, template=template, seed=seed, output=output,
    )  # fmt: skip
    typer.echo(format_table(result))


@reshard_app.command("explain")
def reshard_explain(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="processes of the job; default: the fewest that fit")] = None,
    bandwidth: Annotated[
        float, typer.Option(parser=positive, help="GB/s of a rank to other nodes, each direction")
    ] = 40.0,
    node_bandwidth: Annotated[
        float, typer.Option(parser=positive, help="GB/s of a rank inside of its node, each direction")
    ] = 300.0,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    fp8: Annotated[bool, typer.Option(help="as if the generator held block-quantised FP8 weights")] = False,
) -> None:
    """Bytes per rank and link, buckets, buffers and predicted seconds of a reshard. Starts no process, loads no weights."""
    from r1mega.weights.explain import Bandwidth, explain

    speeds = Bandwidth(bandwidth * 1e9, node_bandwidth * 1e9)
    typer.echo(explain(config, overrides or [], world=gpus, bandwidth=speeds, ranks_per_node=gpus_per_node, fp8=fp8))


@app.command()
def compare(
    first: Annotated[
        Path,
        typer.Argument(
            parser=expanded_path, help="results.json of an evaluation, its run directory, or an output of eval"
        ),
    ],
    second: Annotated[
        Path,
        typer.Argument(parser=expanded_path, help="the same of another checkpoint (or of the same file, see --second)"),
    ],
    first_name: Annotated[str | None, typer.Option("--first", help="which checkpoint, where there are several")] = None,
    second_name: Annotated[
        str | None, typer.Option("--second", help="which checkpoint, where there are several")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="print the table as Markdown")] = False,
) -> None:
    """Two checkpoints on the same problems: paired differences of pass@1, their intervals and p-values."""
    from r1mega.evaluate.compare import comparison_table, read_results

    table = comparison_table(read_results(first, first_name), read_results(second, second_name))
    if markdown:
        typer.echo(table.markdown(), nl=False)
    else:
        table.print()


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(parser=expanded_path, help="an HF directory; or a run directory, or one checkpoint of it")
    ],
    out: Annotated[Path, typer.Argument(parser=expanded_path, help="the directory to make")],
    to_megatron: Annotated[bool, typer.Option("--to-megatron", help="HF directory -> torch_dist checkpoint")] = False,
    to_hf: Annotated[bool, typer.Option("--to-hf", help="torch_dist checkpoint -> HF directory")] = False,
    parallel: Annotated[str, typer.Option(help="tp=..,ep=..,etp=..: the layout that OUT is cut for")] = "",
    config: Annotated[Path | None, path_option("HF directory of the model, if not the run's own")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as the source says")] = None,
    fp8_blocks: Annotated[bool, typer.Option(help="FP8 weights in blocks, as DeepSeek-V3 is published")] = False,
    max_shard_size: Annotated[str, typer.Option(help="largest output file, e.g. 5GB or 512MiB")] = "5GB",
    verify: Annotated[bool, typer.Option(help="compare the checkpoint with its manifest first")] = True,
) -> None:
    """Convert between Hugging Face directories and Megatron checkpoints. What was stopped goes on where it was."""
    from r1mega.checkpoint.convert import ConvertOptions, parse_bytes, parse_parallel
    from r1mega.checkpoint.convert import convert as run_convert
    from r1mega.checkpoint.workers import workers_of_launcher
    from r1mega.config.schema import Dtype

    if to_megatron == to_hf:
        raise ConfigError("say one of --to-megatron and --to-hf")
    dtypes: dict[str | None, Dtype | None] = {None: None, "float32": "float32", "bfloat16": "bfloat16"}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype!r} is neither float32 nor bfloat16")
    largest = parse_bytes(max_shard_size)
    options = ConvertOptions(parse_parallel(parallel), config, dtypes[dtype], fp8_blocks, largest, verify)
    with workers_of_launcher() as workers:
        made = run_convert(source, out, "megatron" if to_megatron else "hf", options, workers)
        if workers.rank == 0:
            typer.echo(made)


@reward_app.command("math")
def reward_math(
    workers: Annotated[int, typer.Option(min=1, help="processes for what only symbolic algebra can tell")] = 1,
    timeout: Annotated[float, typer.Option(parser=positive, help="seconds for one symbolic comparison")] = 5.0,
    max_work: Annotated[int, typer.Option(min=0, help="digits of arithmetic that an answer may leave undone")] = 1,
) -> None:
    """{"gold", "prediction"} lines in; {"value", "status", "reason"} lines out, in the same order."""
    from r1mega.reward.math import score_stream

    score_stream(_standard_input(), sys.stdout, num_workers=workers, timeout_seconds=timeout, max_work=max_work)


@reward_app.command("code")
def reward_code(
    workers: Annotated[int, typer.Option(min=1, help="programs that run at a time")] = 1,
    partial_credit: Annotated[bool, typer.Option(help="the share of the tests passed, not all or nothing")] = False,
) -> None:
    """Programs ("prediction") with their tests in, a line each; {"value", "status", "reason"} lines out, in order."""
    from r1mega.reward.code import CodeReward, score_stream

    reward = CodeReward(partial_credit=partial_credit)
    score_stream(_standard_input(), sys.stdout, reward=reward, num_workers=workers)


def _standard_input() -> Iterator[str]:
    """Its lines, whatever the locale says; a byte order mark before one is left out. DataError for what is no UTF-8."""
    from r1mega.data.text import decode

    return (decode(line, f"<stdin>:{number}") for number, line in enumerate(sys.stdin.buffer, start=1))


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    silence()
    with ending.told():
        app()
