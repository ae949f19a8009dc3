"""Run the experiments behind docs/claims.md, and write their table.

    python tools/run_claims.py --claims 1 2 3 --seeds 1 2 3

Each step is a command that is printed before it runs and that skips what it finished before, so that a run cut short
goes on. Everything lies under runs/claims. --table only reads what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from r1mega.reward.extract import final_text

RUNS = Path("runs/claims")
PIPELINE = Path("configs/nano/claims/r1.yaml")
Figures = dict[str, float]
"""The measured figures of one seed, by column."""


@dataclass(frozen=True)
class Claim:
    """steps: which nodes of the pipeline are run, as `r1mega pipeline` is told it (a function is called with the seed).
    measure: the figures of a finished seed. holds: what the figures must satisfy in every seed.
    """

    number: int
    text: str
    steps: tuple[str | Callable[[int], None], ...]
    measure: Callable[[Path], Figures]
    holds: Callable[[Figures], bool]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", type=int, nargs="+", default=sorted(CLAIMS), choices=sorted(CLAIMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for seed in [] if arguments.table else arguments.seeds:
        for number in arguments.claims:
            for step in CLAIMS[number].steps:
                step(seed) if callable(step) else run_pipeline(seed, step)
    for number in arguments.claims:
        print(table(CLAIMS[number], arguments.seeds))
    return 0


def run_pipeline(seed: int, nodes: str) -> None:
    """Nodes of the claims' pipeline: "--until NODE" or "--only NODE"."""
    command = ["pipeline", str(PIPELINE), *nodes.split(), f"dir={RUNS}/seed{seed}", f"overrides.seed={seed}"]
    print("$ r1mega " + " ".join(command), flush=True)
    if (code := subprocess.run([sys.executable, "-m", "r1mega", *command]).returncode) != 0:
        sys.exit(code)


def table(claim: Claim, seeds: Sequence[int]) -> str:
    """Markdown: a row a seed, and the mean over them. Seeds without results are left out."""
    measured: dict[int, Figures] = {}
    for seed in seeds:
        try:
            measured[seed] = claim.measure(RUNS / f"seed{seed}")
        except FileNotFoundError as error:
            print(f"claim {claim.number}, seed {seed}: not measured ({error.filename} is missing)", file=sys.stderr)
    head = f"### {claim.number}. {claim.text}\n\n"
    if not measured:
        return head + "Unmeasured.\n"
    columns = list(next(iter(measured.values())))
    lines = [["seed", *columns, "holds"], ["---"] * (len(columns) + 2)]
    for seed, figures in measured.items():
        lines.append([str(seed), *(f"{figures[c]:.3f}" for c in columns), "yes" if claim.holds(figures) else "no"])
    if len(measured) > 1:
        by_column = ([figures[column] for figures in measured.values()] for column in columns)
        mean = [f"{fmean(values):.3f} ± {stdev(values):.3f}" for values in by_column]
        held = sum(claim.holds(figures) for figures in measured.values())
        lines.append(["mean ± sd", *mean, f"{held} of {len(measured)}"])
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -------------------------------------------------------------------------------------------------------- what is read


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(run: Path) -> tuple[dict, dict]:
    """Before the first step and after the last, on 256 problems that neither the base nor RL has seen (T = 1)."""
    lines = records(run / "evaluations.jsonl")
    return lines[0], lines[-1]


def accuracy(seed: Path) -> Figures:
    before, after = evaluations(seed / "zero")
    return {
        "accuracy, base": before["eval/accuracy"],
        "after RL": after["eval/accuracy"],
        "times": after["eval/accuracy"] / before["eval/accuracy"],
    }


def length(seed: Path) -> Figures:
    before, after = evaluations(seed / "zero")
    lines = records(seed / "zero" / "metrics.jsonl")

    def over(name: str, first: int, last: int) -> float:
        return fmean(line[f"response/{name}"] for line in lines[first - 1 : last])

    return {
        "tokens, base": before["eval/length_mean"],
        "after RL": after["eval/length_mean"],
        "tokens, steps 1-5": over("length_mean", 1, 5),
        "11-15": over("length_mean", 11, 15),
        "56-60": over("length_mean", 56, 60),
        "self-correcting, steps 1-5": over("reflection_fraction", 1, 5),
        "11-15 ": over("reflection_fraction", 11, 15),
        "56-60 ": over("reflection_fraction", 56, 60),
    }


def languages(seed: Path) -> Figures:
    (base, without), (_, rewarded) = evaluations(seed / "zero"), evaluations(seed / "zero_language")
    mixed, right = "eval/mixed_language_fraction", "eval/accuracy"
    return {
        "mixed, base": base[mixed],
        "RL": without[mixed],
        "RL + language reward": rewarded[mixed],
        "accuracy, RL": without[right],
        "RL + language reward ": rewarded[right],
        "cost": without[right] - rewarded[right],
    }


def hacking(seed: Path) -> Figures:
    """The reward model's mean value over the run beside the accuracy that it was taught to stand for."""
    lines = records(seed / "hacking" / "zero" / "metrics.jsonl")
    _, neural = evaluations(seed / "hacking" / "zero")
    base, rule = evaluations(seed / "zero")
    model = records(seed / "hacking" / "reward_model" / "metrics.jsonl")[-1]
    return {
        "reward model's held-out accuracy": model["eval/accuracy"],
        "its reward, first 5 steps": fmean(line["reward/harmlessness"] for line in lines[:5]),
        "last 5": fmean(line["reward/harmlessness"] for line in lines[-5:]),
        "accuracy, base": base["eval/accuracy"],
        "RL on the reward model": neural["eval/accuracy"],
        "RL on the rule": rule["eval/accuracy"],
    }


def recipe_figures(seed: Path) -> dict[str, dict[str, float]]:
    """Of each checkpoint: the figures on puzzles, and `general`: requests answered with the best reply."""
    references = {r["id"]: r["reference"] for r in records(seed / "base" / "data" / "general_eval.jsonl")}
    figures = {}
    for checkpoint in json.loads((seed / "evaluate" / "results.json").read_text())["checkpoints"]:
        general = json.loads((seed / "evaluate" / checkpoint["tasks"]["general"]["file"]).read_text())["rows"]
        replies = [final_text(text) == references[row["prompt_id"]] for row in general for text in row["texts"]]
        figures[checkpoint["name"]] = checkpoint["tasks"]["puzzles"]["metrics"] | {"general": fmean(replies)}
    return figures


def cold_start(seed: Path) -> Figures:
    figures = recipe_figures(seed)
    share, right, mixed = "eval/language_share", "eval/accuracy", "eval/mixed_language_fraction"
    return {
        "question's language, zero": figures["zero"][share],
        "cold start": figures["cold_start_sft"][share],
        "mixed, zero": figures["zero"][mixed],
        "cold start ": figures["cold_start_sft"][mixed],
        "accuracy, RL with": figures["reasoning_rl"][right],
        "without": figures["without_cold_start"][right],
        "question's language, RL with": figures["reasoning_rl"][share],
        "without ": figures["without_cold_start"][share],
    }


def stages(seed: Path) -> Figures:
    figures = recipe_figures(seed)
    ladder = ("base", "zero", "cold_start_sft", "reasoning_rl", "sft", "align")
    return {name: figures[name]["eval/accuracy"] for name in ladder} | {
        f"general, {name}": figures[name]["general"] for name in ("reasoning_rl", "sft", "align")
    }


def distillation(seed: Path) -> Figures:
    figures = recipe_figures(seed)
    return {name: figures[name]["eval/accuracy"] for name in ("student_base", "student_rl", "distill", "reasoning_rl")}


def make_pairs(seed: int) -> None:
    """A right and a wrong response to the same question, at most two pairs a question; a tenth is held out."""
    directory = RUNS / f"seed{seed}" / "hacking"
    result = json.loads((directory / "samples" / "base" / "prompts" / "result.json").read_text())
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for number, row in enumerate(result["rows"]):
        right = [text for text, correct in zip(row["texts"], row["correct"], strict=True) if correct]
        wrong = [text for text, correct in zip(row["texts"], row["correct"], strict=True) if correct is False]
        for chosen, rejected in list(zip(right, wrong, strict=False))[:2]:
            line = {"question": row["question"], "chosen": chosen, "rejected": rejected}
            parts["held_out" if number % 10 == 0 else "train"].append(json.dumps(line, ensure_ascii=False) + "\n")
    for name, lines in parts.items():
        (directory / f"pairs_{name}.jsonl").write_text("".join(lines))
    print(f"claim 7: {len(parts['train'])} pairs to train on, {len(parts['held_out'])} held out", flush=True)


CLAIMS = {
    claim.number: claim
    for claim in (
        Claim(
            1, "RL alone, straight from the base, lifts accuracy several-fold", ("--until zero",), accuracy,
            lambda f: f["times"] >= 2,
        ),
        Claim(
            2, "Responses grow longer as RL goes on; reflection appears", ("--until zero",), length,
            lambda f: f["after RL"] > 1.5 * f["tokens, base"] and f["56-60 "] > 2 * f["self-correcting, steps 1-5"],
        ),
        Claim(
            3, "R1-Zero mixes languages; the language-consistency reward stops that at a slight cost in accuracy",
            ("--until zero_language",), languages,
            lambda f: f["RL"] > f["mixed, base"] and f["RL + language reward"] < 0.1 * f["RL"],
        ),
        Claim(
            4, "A small cold start makes outputs readable and the final model better", ("--until evaluate",),
            cold_start,
            lambda f: f["cold start"] > f["question's language, zero"] and f["accuracy, RL with"] > f["without"],
        ),
        Claim(
            5, "Stages help: base < zero, cold start < reasoner; the last keeps reasoning and gains general ability",
            ("--until evaluate",), stages,
            lambda f: f["base"] < f["zero"] and f["cold_start_sft"] < f["reasoning_rl"]
            and f["align"] > f["reasoning_rl"] - 0.05 and f["general, align"] > f["general, reasoning_rl"],
        ),
        Claim(
            6, "Distilling the big model's samples into a small one beats the same RL on the small one",
            ("--until evaluate",), distillation, lambda f: f["distill"] > f["student_rl"],
        ),
        Claim(
            7, "A neural reward on reasoning can be hacked where a rule cannot",
            ("--until zero", "--only samples", make_pairs, "--only reward_reasoning", "--only zero_neural"), hacking,
            lambda f: f["last 5"] > f["its reward, first 5 steps"]
            and f["RL on the reward model"] < f["RL on the rule"] - 0.1,
        ),
    )
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
