"""How sure a rule is: how often it was right in the benchmark.

`bench/faults.py --calibrate` prints this table from its own cases: for each rule, in how many of them it gave the first
finding, and in how many of those cause and layer were right. The confidence is (right + 1) / (said + 2), Laplace's rule of
succession, so that a rule that spoke seldom is not taken for certain. Behind the first finding a rule has what is left over.

These are of `--seed 0` (bench/results/faults-cpu.txt); how well they hold with another seed that command prints too.
"""

from __future__ import annotations

COUNTS: dict[str, tuple[int, int]] = {
    "bad_batch": (51, 52),
    "cut_gradient": (20, 20),
    "dead_output": (10, 10),
    "fed_with_zeros": (2, 2),
    "few_words": (8, 8),
    "gradient_jump": (33, 35),
    "labels": (23, 23),
    "no_graph": (3, 3),
    "nonfinite_backward": (36, 37),
    "nonfinite_forward": (45, 45),
    "nonfinite_input": (24, 27),
    "nonfinite_loss": (12, 12),
    "nonfinite_weight": (24, 24),
    "optimizer_state": (7, 7),
    "output_grown": (36, 36),
    "overflow": (23, 23),
    "rate_jumped": (23, 23),
    "rate_rose": (12, 12),
    "underflow": (12, 13),
    "vanishing": (12, 12),
    "weight_corruption": (24, 24),
    "wrong_labels": (12, 12),
}
"""rule -> (right, said)"""


def confidence(rule: str) -> float:
    """Between 0 and 1; a half for a rule that never spoke in the benchmark."""
    right, said = COUNTS.get(rule, (0, 0))
    return (right + 1) / (said + 2)
