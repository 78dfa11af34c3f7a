"""How sure a rule is: how often it was right in the benchmark.

`bench/faults.py --calibrate` prints this table from its own cases: for each rule, in how many of them it gave the first
finding, and in how many of those cause and layer were right. The confidence is (right + 1) / (said + 2), Laplace's rule of
succession, so that a rule that spoke seldom is not taken for certain.
"""

from __future__ import annotations

COUNTS: dict[str, tuple[int, int]] = {}
"""rule -> (right, said)"""


def confidence(rule: str) -> float:
    """Between 0 and 1; a half for a rule that never spoke in the benchmark."""
    right, said = COUNTS.get(rule, (0, 0))
    return (right + 1) / (said + 2)
