"""The benchmark itself: a sample of its cases through a real Recorder, and what it counts."""

import re

import pytest
import torch
from fault_healthy import HEALTHY
from fault_healthy import train as train_healthy
from fault_runs import cases, train
from fault_score import departs, judged, record, score
from fault_table import FAULTS

import nobs
from nobs._schema import CAUSES
from nobs.diagnosis import RULES, calibration

QUICK = ("one NaN in a weight", "a weight x 1e3", "a layer dies", "learning rate x 1000", "labels shuffled", "a batch x 1e4")


def case_of(fault, model="convnet"):
    """An eager float32 case."""
    return next(c for c in cases(40) if c.fault == fault and c.model == model and not c.compiled and c.dtype == "float32")


def test_the_published_table():
    """Causes of the closed list; hundreds of cases, the same in every run, each with a layer of its model."""
    drawn = list(cases(12))
    assert len(drawn) >= 400
    assert drawn == list(cases(12))
    assert len({case.name for case in drawn}) > 400
    assert len(HEALTHY) * 10 >= 300
    for fault in FAULTS.values():
        assert set(fault.causes) <= set(CAUSES)
    assert {case.fault for case in drawn} == set(FAULTS)


@pytest.mark.parametrize("fault", QUICK)
def test_a_fault_through_a_recorder(fault, tmp_path, capsys):
    """The Recorder stops at the step, and says what the benchmark counts from its recording."""
    case = case_of(fault)
    made = []

    def recording(model, *, optimizer, scaler):
        nobs.instrument(model)
        made.append(nobs.Recorder(model, optimizer=optimizer, scaler=scaler, directory=tmp_path, on_failure="stop"))
        return Telling(made[0])

    train(case, recording)
    report = made[0].report
    run, twin = record(lambda recording: train(case, recording)), record(lambda recording: train(case, recording, False))
    outcome = score(case, run, twin)
    assert departs(case, run, twin)
    assert (outcome.detected, outcome.cause_right, outcome.layer_first) in [(True, True, True), (True, True, None)]
    failure, told = judged(run)
    assert (report.failure.trigger, report.failure.step) == (failure.trigger, failure.step)
    assert [(f.cause, f.layer, f.step) for f in report.findings] == [
        (t.finding.cause, t.finding.layer, t.finding.step) for t in told
    ]
    assert not departs(case, twin, twin)


class Telling:
    """A Recorder as the benchmark's runs use it: the block gives `step`."""

    def __init__(self, recorder):
        self.recorder = recorder

    def __enter__(self):
        return self.recorder.__enter__().step

    def __exit__(self, *error):
        return self.recorder.__exit__(*error)


@pytest.mark.parametrize(
    "kind", ["losses of zero", "memorised data", "masked logits", "freezing", "experts and two tasks", "a GAN"]
)
def test_a_healthy_run(kind):
    """No trigger fires."""
    run = record(lambda recording: train_healthy(kind, 0, recording))
    assert judged(run) == (None, ())
    assert torch.tensor(run.losses).isfinite().all()


def test_every_rule_is_calibrated():
    """The names under which rules speak are those that were counted, and a confidence is between 0 and 1."""
    import inspect

    sources = {inspect.getsourcefile(rule) for rule in RULES}
    spoken = set()
    for path in sources:
        with open(path) as file:  # noqa: PTH123
            spoken |= set(re.findall(r'(?:finding\(\s*seen|without_layer\()\s*,?\s*"(\w+)"', file.read()))
    assert set(calibration.COUNTS) <= spoken | set(CAUSES)
    assert all(0 <= right <= said for right, said in calibration.COUNTS.values())
    assert calibration.confidence("never spoke") == 0.5
