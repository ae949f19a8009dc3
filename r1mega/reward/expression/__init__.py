"""A small reader of written mathematics: text clean-up, parser, evaluation and comparison, without sympy.

`text` -> `qualifiers` -> `parse` -> `compare` (with `names`, `values`, `evaluate` and `intervals`). It decides nearly all
answers that graders meet in microseconds; what it cannot read goes to `r1mega.reward.symbolic` in a worker process.

Why not math-verify alone: on tests/data/answer_pairs.jsonl that accepts 55 of 386 wrong answers, which a policy learns to
give, and refuses 255 of 540 right ones; on plain ones both agree, and this reader takes a small part of the time
(`tools/bench_rewards.py`; docs/rewards.md, "Math").
"""
