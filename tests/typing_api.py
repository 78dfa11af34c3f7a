"""The public API as a typed user writes it; checked by mypy, never run."""

from pathlib import Path

import torch
from torch import nn

import nobs
from nobs.triggers import GradientNorm, LossSpike, NonFinite


class Net(nn.Module):
    def own_method(self) -> int:
        return 1


class Mine:
    def update(self, state: object, row: nobs.Row) -> tuple[object, nobs.Failure | None]:
        return state, nobs.Failure("Mine", row.step, "no") if row["fc", "output", "norm"] > 3 else None


def use() -> Path | None:
    model = nobs.instrument(Net(), layers=["blocks.*", nn.Linear, lambda name, module: True], every=2)
    one: int = model.own_method()  # the type of the model is kept
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nobs.Recorder(model, optimizer=[optimizer], triggers=[NonFinite(), GradientNorm(10.0), LossSpike(), Mine()]) as recorder:
        recorder.step(torch.ones(()), batch="a.tar", accuracy=0.5)
        recorder.step(1.0)
        recorder.step(None)
    box: Path | None = nobs.Recorder(model, blackbox=Path("elsewhere"), durable=True).blackbox
    history: nobs.History = recorder.history()
    norms = history["fc", "output", "norm"]
    report: nobs.Report = nobs.load("crashes")
    if report.failure is not None:
        step: int = report.failure.step
        print(one, norms.max(), step, [finding.cause for finding in report.findings])
    ring = nobs.RingBuffer(model, capacity=3)
    engine = nobs.TriggerEngine(grad_threshold=100.0, spike_factor=3.0, triggers=[Mine()])
    for row in ring.drain():
        failure: nobs.Failure | None = engine.check(row)
        if failure:
            return ring.save_json("crash.json", trigger_reason=failure.message)
    same: Net = nobs.uninstrument(model)
    return box if same else recorder.dump()
