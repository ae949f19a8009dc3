"""A small reader of written mathematics: text clean-up, parser, evaluation and comparison, without sympy.

`text` -> `parse` -> `compare` (with `evaluate` and `intervals`). It decides nearly all answers that graders meet in
microseconds; what it cannot read goes to `r1mega.reward.symbolic` in a worker process.
"""
