"""Every metric by name: what it means and in which unit. `docs/metrics.md` is made from this table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from r1mega.observe.performance import RATED

PHASES = ("rollout", "reward", "logprob", "update", "reshard")
"""The phases of an RL step, in their order; each has a `time/<phase>_seconds`."""

_THE = {"rollout": "the rollout", "logprob": "the log-prob phase", "update": "the update", "step": "the step"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table. A name may hold one `*`, which stands for any non-empty text."""

    name: str
    unit: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("step", "count", "steps finished; 0 is the state before the first one"),
    Metric("reward/mean", "reward", "mean over responses of the weighted sum of reward parts"),
    Metric("reward/accuracy", "fraction", "responses whose final answer equals the gold"),
    Metric("reward/format", "fraction", "responses in the asked form (thinking, then answer)"),
    Metric("reward/std", "reward", "standard deviation of the reward over all responses of the step"),
    Metric("reward/excluded_fraction", "fraction", "responses whose reward could not be computed; not trained on"),
    Metric("reward/*", "reward", "mean of the unweighted reward part of this name"),
    Metric("reward_pool/deferred", "count", "scores of the step that had to be waited for: worker processes, programs"),
    Metric("reward_pool/failed", "count", "tasks given up after their retries"),
    Metric("reward_pool/retries", "count", "tasks tried again on a fresh worker"),
    Metric("reward_pool/kills", "count", "workers killed for overrunning a task's limit"),
    Metric("reward_pool/crashes", "count", "workers that died by themselves"),
    Metric("reward_pool/queue_max", "count", "most scores that were unfinished at one time (of the rank with most)"),
    Metric(
        "reward_pool/p50_seconds", "s", "median time from submission to score, waiting included (of the slowest rank)"
    ),
    Metric("reward_pool/p99_seconds", "s", "99th percentile of the same"),
    Metric("reward_pool/*", "mixed", "further figures about scoring"),
    Metric("group/no_signal_fraction", "fraction", "groups whose rewards are all equal (advantage zero)"),
    Metric("group/num_rounds", "count", "sampling rounds of the step (more than one: dynamic sampling refilled)"),
    Metric(
        "group/num_sampled",
        "count",
        "groups sampled in the step, dropped ones included; with rollout.partial those drawn in it",
    ),
    Metric("group/*", "mixed", "further figures about groups of responses to one prompt"),
    Metric(
        "staleness/mean",
        "updates",
        "rollout.partial: steps between a token's weights and the present ones, mean over the trained tokens",
    ),
    Metric("staleness/max", "updates", "the same of the stalest token; at most rollout.partial.max_staleness"),
    Metric("staleness/stale_fraction", "fraction", "trained tokens that older weights sampled"),
    Metric("partial/open_groups", "count", "groups that go on in the next step"),
    Metric("partial/cut_tokens", "tokens", "what a response that went on could get in the step"),
    Metric("partial/surplus_tokens", "tokens", "sampled past that number while others were behind, and thrown away"),
    Metric("partial/dropped_tokens", "tokens", "of groups that were given up as too stale (on_stale=drop)"),
    Metric("response/length_mean", "tokens", "mean length of responses"),
    Metric("response/length_max", "tokens", "longest response"),
    Metric("response/truncated_fraction", "fraction", "responses cut at rollout.max_response_tokens"),
    Metric("response/reflection_fraction", "fraction", "responses that re-check or correct themselves"),
    Metric("response/mixed_language_fraction", "fraction", "responses whose reasoning mixes languages"),
    Metric("response/*", "mixed", "further figures about responses"),
    Metric("policy/loss", "loss", "the objective that was minimised, mean over optimizer steps"),
    Metric(
        "policy/kl",
        "nats/token",
        "KL of the policy from the reference model (k3 estimate); with rollout.top_p, top_k or min_p of both over the ids kept",
    ),
    Metric("policy/clip_fraction", "fraction", "response tokens whose ratio was clipped"),
    Metric(
        "policy/importance_capped_fraction",
        "fraction",
        "response tokens whose importance weight exceeded algorithm.importance_cap",
    ),
    Metric("policy/masked_fraction", "fraction", "response tokens without policy gradient by algorithm.off_policy"),
    Metric("policy/rejected_fraction", "fraction", "response tokens of responses that algorithm.off_policy dropped"),
    Metric(
        "policy/effective_sample_fraction",
        "fraction",
        "effective sample size of the importance weights over the tokens, (sum w)^2 / (tokens * sum w^2), masked ones 0; null without corrections",
    ),
    Metric(
        "policy/entropy",
        "nats/token",
        "mean entropy of the policy's next-token distribution; with rollout.top_p, top_k or min_p over the ids kept",
    ),
    Metric("policy/grad_norm", "norm", "global gradient norm before clipping, mean over optimizer steps"),
    Metric("policy/skipped_updates", "count", "optimizer steps left out: their gradient was not finite"),
    Metric("policy/learning_rate", "1", "learning rate of the step's last optimizer step"),
    Metric("policy/*", "mixed", "further figures about the policy and its update"),
    Metric(
        "logprob/diff_max",
        "nats",
        "largest |trainer - sampler| log-prob on the same tokens (those of the step's first optimizer step); below 2e-4 in float32, in bfloat16 nats where experts part (docs/dtypes.md)",
    ),
    Metric(
        "logprob/diff_mean",
        "nats",
        "mean of the same: about 1e-6 in float32, 0.001 to 0.005 in bfloat16, 0.01 in FP8",
    ),
    Metric(
        "logprob/outlier_fraction",
        "share of tokens",
        "those off by more than weights.probe_tolerance (2e-4 in float32, 0.15 in bfloat16, 0.4 in FP8)",
    ),
    Metric(
        "logprob/kept_ids",
        "count",
        "ids that a response token was drawn from, in the mean, with rollout.top_p, top_k or min_p; null without",
    ),
    Metric("logprob/*", "nats", "further figures about the trainer-sampler mismatch"),
    Metric(
        "expert/load_max_over_mean",
        "ratio",
        "busiest expert's tokens over the mean, averaged over MoE layers; null without experts",
    ),
    Metric("expert/*", "mixed", "further figures about experts"),
    *(Metric(f"time/{phase}_seconds", "s", f"time of the {phase} phase in the step") for phase in PHASES),
    Metric("time/rollout_wait_seconds", "s", "rollout.partial: time in which the rank waited for other generators"),
    Metric("time/evaluate_seconds", "s", "time of the evaluation in the step"),
    Metric("time/step_seconds", "s", "wall time of the whole step"),
    Metric("time/*_seconds", "s", "time of the phase of this name in the step"),
    Metric("tokens/rollout_per_second", "tokens/s", "sampled tokens over the rollout's time"),
    Metric("tokens/update_per_second", "tokens/s", "trained tokens (prompt and response) over the update's time"),
    Metric(
        "tokens/rollout",
        "tokens",
        "sampled tokens of the step; with rollout.partial all that it added, those of responses that go on included",
    ),
    Metric("tokens/update", "tokens", "trained tokens of the step (prompt and response, all epochs)"),
    Metric(
        "tokens/logprob",
        "tokens",
        "tokens whose log-probs were computed before the update (old policy's and reference's both count)",
    ),
    Metric("tokens/step", "tokens", "tokens of the samples that the step trained on (prompt and response, once)"),
    Metric("tokens/*", "mixed", "further figures about tokens"),
    *(
        metric
        for phase in RATED
        for metric in (
            Metric(f"perf/{phase}_flops", "FLOP", f"model FLOPs of {_THE[phase]}, all ranks (r1mega/model/flops.py)"),
            Metric(
                f"perf/{phase}_tokens_per_second_per_gpu",
                "tokens/s",
                f"tokens/{phase} over the time of {_THE[phase]} (the slowest rank's) and the number of ranks",
            ),
            Metric(f"perf/{phase}_tflops_per_gpu", "TFLOP/s", "model FLOPs over the same time and the number of ranks"),
            Metric(
                f"perf/{phase}_mfu",
                "fraction",
                "the same over the device's peak (observe.peak_tflops); null where it is not known",
            ),
        )
    ),
    Metric("straggler/*_worst_rank", "rank", "the rank that took longest in this phase of the step"),
    Metric(
        "straggler/*_worst_seconds",
        "s",
        "its time; ranks that wait for others inside of a phase (all but rollout and reward) take as long as the slowest",
    ),
    Metric("straggler/*_median_seconds", "s", "the ranks' median time in this phase"),
    Metric("memory/rss_bytes", "bytes", "resident memory of the rank's process"),
    Metric(
        "memory/*_device_peak_bytes",
        "bytes",
        "most that torch held of a GPU in this phase since the line before (fullest rank)",
    ),
    Metric(
        "memory/*_host_peak_bytes",
        "bytes",
        "most resident memory of a process in this phase since the line before (fullest rank)",
    ),
    Metric(
        "memory/device_used_bytes", "bytes", "taken of a GPU, by whatever, when the line was written (fullest rank)"
    ),
    Metric("memory/*", "bytes", "further figures about memory"),
    Metric(
        "packing/fill_fraction",
        "fraction",
        "real tokens over microbatches of one size: the largest of their optimizer step",
    ),
    Metric("packing/*", "mixed", "further figures about packing"),
    Metric("weights/probe_diff_max", "nats", "largest |trainer - generator| log-prob of the fixed probe after a push"),
    Metric(
        "weights/probe_outlier_fraction",
        "share of tokens",
        "those of the probe off by more than weights.probe_tolerance; none may be in float32, a tenth in bfloat16 and FP8",
    ),
    Metric("weights/*", "mixed", "figures about the transfer of weights to the generator and its proof"),
    Metric("train/loss", "nats/token", "cross-entropy of the training tokens (base and SFT stages)"),
    Metric("train/held_out_loss", "nats/token", "the same on samples that are not trained on (SFT stages)"),
    Metric("train/*", "mixed", "further figures about supervised training"),
    Metric("preference/loss", "nats", "loss of a reward model's training pairs (or responses)"),
    Metric(
        "preference/accuracy",
        "fraction",
        "training pairs scored in order (responses on the right side of 0), before the update",
    ),
    Metric("preference/*", "mixed", "further figures about the training of reward models"),
    Metric("probe/skills", "fraction", "the lowest of the other probes: what RL can build on"),
    Metric(
        "probe/*", "fraction", "tokens of this kind, in clean reasoning, that get more than half of the probability"
    ),
    Metric("eval/accuracy", "fraction", "pass@1 on the evaluation prompts, mean over samples"),
    Metric("eval/accuracy_low", "fraction", "lower end of its 95% interval (clustered by prompt)"),
    Metric("eval/accuracy_high", "fraction", "upper end of its 95% interval (clustered by prompt)"),
    Metric("eval/consensus", "fraction", "accuracy of the majority answer (cons@k)"),
    Metric("eval/format", "fraction", "evaluation responses in the asked form"),
    Metric("eval/length_mean", "tokens", "mean length of evaluation responses"),
    Metric("eval/truncated_fraction", "fraction", "evaluation responses that were cut"),
    Metric("eval/reflection_fraction", "fraction", "evaluation responses that re-check or correct themselves"),
    Metric("eval/mixed_language_fraction", "fraction", "evaluation responses whose reasoning mixes languages"),
    Metric(
        "eval/language_share",
        "fraction",
        "words of the reasoning that are in the prompt's language, mean over responses",
    ),
    Metric(
        "eval/rating",
        "Elo points",
        "rating of a solver of the same problems, most likely (evaluation sets with rated problems)",
    ),
    Metric("eval/rating_low", "Elo points", "lower end of its 95% interval"),
    Metric("eval/rating_high", "Elo points", "upper end of its 95% interval"),
    Metric("eval/pass_at_*", "fraction", "at least one of so many samples is correct (unbiased estimate)"),
    Metric("eval/excluded_fraction", "fraction", "evaluation responses whose reward could not be computed"),
    Metric("eval/prompts", "count", "evaluation prompts"),
    Metric(
        "eval/failed",
        "count",
        "1 where the evaluation ended in an error, which the log tells; nothing else is known then",
    ),
    Metric("eval/length_correlation", "1", "reward models: correlation of score and length over held-out responses"),
    Metric(
        "eval/accuracy_shorter",
        "fraction",
        "reward models: held-out pairs in order, of those whose better response is shorter",
    ),
    Metric("eval/accuracy_longer", "fraction", "reward models: the same where it is longer"),
    Metric("eval/separation", "fraction", "reward models: chance that a safe response scores above an unsafe one"),
    Metric("eval/*", "mixed", "further figures of the evaluation"),
)


def find_metric(name: str) -> Metric | None:
    """The table's entry for a name: the exact one, else the family that matches it, else None."""
    for metric in METRICS:
        if metric.name == name:
            return metric
    for metric in METRICS:
        if "*" in metric.name and re.fullmatch(re.escape(metric.name).replace(r"\*", ".+"), name):
            return metric
    return None


def metrics_markdown() -> str:
    """The table as Markdown: the whole of docs/metrics.md."""
    head = (
        "# Metrics\n\n"
        "One JSON object a step in `RUN_DIR/metrics.jsonl`; the same names in TensorBoard and W&B.\n"
        "A value that was not finite, or does not apply, is `null`. `*` stands for any name.\n"
        "Made by `python -m r1mega.observe.registry > docs/metrics.md`.\n\n"
        "| name | unit | meaning |\n|---|---|---|\n"
    )
    return head + "".join(f"| `{m.name}` | {m.unit} | {m.meaning.replace('|', chr(92) + '|')} |\n" for m in METRICS)


if __name__ == "__main__":
    print(metrics_markdown(), end="")
