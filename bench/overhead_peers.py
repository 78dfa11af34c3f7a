"""The other tools of the table, each at the cheapest of its settings that looks at every layer at every step.

Peers are imported when they are attached: a bench without them says "not installed". What a peer prints goes nowhere, and what
it writes goes into the folder of the bench.

- `wandb.watch(log="all", log_freq=1)` and a `log` a step, offline: histograms of parameters and gradients; its own process.
- transformers' `DebugUnderflowOverflow`, with its defaults: smallest and largest of parameters, inputs and outputs, as text.
- Lightning's `SpikeDetection`, which sees the loss, and `grad_norm(model, 2)` behind each backward; nothing is logged.
- `torch.autograd.set_detect_anomaly(True)`: looks at every backward for NaN, keeps nothing.
- trainscope: parameters and gradients at each step by itself; outputs with `activation_metrics_every_n_steps=1`. Histograms and
  memory tracking are off, the statistics are computed on the model's device and not on the host, the loss goes in by `item()`,
  as its documentation shows.
- pulsegrad's `watch(k=1)`, in its default mode, in which a thread of its own waits for the device.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
import torch.nn.modules.module as modules
import torch.optim.optimizer as optimizers
from overhead_loop import Attached, Job
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from torchvision_anyway import torchvision

NEVER = 10**9
"""Every so many steps: not in a bench."""


def _quietly(function: Callable[..., object]) -> Callable[..., object]:
    """The same, printing nothing."""

    @wraps(function)
    def quiet(*args: object, **kwargs: object) -> object:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return function(*args, **kwargs)

    return quiet


def wandb_watch(job: Job) -> Attached:
    """Histograms of all parameters and gradients."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False)
    run = wandb.init(mode="offline", dir=job.folder, project="bench", settings=settings)
    run.watch(job.model, log="all", log_freq=1)
    seen: dict[str, object] = {}
    write = run._log

    def counted(data: dict[str, object], *args: object, **kwargs: object) -> None:
        seen.update(dict.fromkeys(data))
        write(data, *args, **kwargs)

    def read() -> int:
        return sum(name.startswith(("parameters/", "gradients/")) for name in seen)

    def close() -> None:
        run.unwatch(job.model)
        _quietly(run.finish)()

    run._log = counted  # one call a histogram, from hooks: too cheap to matter beside making it
    kinds = ("parameter", "parameter.grad")
    return Attached(after=lambda loss: run.log({"loss": loss.item()}), read=read, kinds=kinds, close=close)


def underflow_overflow(job: Job) -> Attached:
    """Forward hooks on all modules; frames of the last 21 modules."""
    with contextlib.suppress(ImportError):
        torchvision()  # transformers imports it where it is installed
    from transformers.debug_utils import DebugUnderflowOverflow

    debugger = DebugUnderflowOverflow(job.model)
    return Attached(read=lambda: debugger.total_calls // max(debugger.batch_number, 1), kinds=("output", "parameter"))


def spike_detection(job: Job) -> Attached:
    """The running mean of the loss, and the norm of every gradient."""
    with contextlib.suppress(ImportError):
        torchvision()  # torchmetrics imports it where it is installed
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.spike import SpikeDetection
    from lightning.pytorch.utilities import grad_norm

    fabric, detector = Fabric(accelerator=job.device.type, devices=1), SpikeDetection(exclude_batches_path=job.folder)
    norms: dict[str, Tensor] = {}
    steps = iter(range(NEVER))

    def before_update(loss: Tensor) -> None:
        norms.update(grad_norm(job.model, 2))

    def after(loss: Tensor) -> None:
        detector.on_train_batch_end(fabric, loss.detach(), None, next(steps))

    return Attached(before_update, after, read=lambda: len(norms) - 1, kinds=("parameter.grad",))


def detect_anomaly(job: Job) -> Attached:
    """A mode of autograd's, on while the loop's own steps run."""
    return Attached(active=lambda: torch.autograd.set_detect_anomaly(True, check_nan=True))


def train_scope(job: Job) -> Attached:
    """Statistics of outputs, parameters and gradients, written as Arrow files."""
    from trainscope import TrainScope
    from trainscope.core.config import TrainScopeConfig

    logging.getLogger("trainscope").setLevel(logging.ERROR)
    config = TrainScopeConfig(
        run_dir=str(job.folder),
        activation_metrics_every_n_steps=1,
        histogram_every_n_steps=NEVER,
        track_memory=False,
        device=str(job.device),
    )
    scope = TrainScope(job.model, job.optimizer, config).attach()
    parameters = [name for name, _ in job.model.named_parameters()]

    def read() -> int:
        """A gradient and a parameter a line; and once a layer its output."""
        last = {name: scope._buffer.get_layer_steps(name)[-1] for name in parameters}
        outputs = {name.rpartition(".")[0] for name, line in last.items() if line["act_mean"] is not None}
        return 2 * len(last) + len(outputs)

    return Attached(
        before_update=lambda loss: scope.step(loss.item()),
        read=read,
        kinds=("output", "parameter", "parameter.grad"),
        close=scope.detach,
    )


def pulse_grad(job: Job) -> Attached:
    """Moments and histograms of outputs and gradients, moments of parameters, in SQLite."""
    folder = job.folder / "pulsegrad"
    settings = {"RUNS_DIR": folder / "runs", "CONFIG_PATH": folder / "config.toml", "CONSOLE": "off", "LOG_LEVEL": "ERROR"}
    os.environ.update({f"PULSEGRAD_{name}": str(value) for name, value in settings.items()})  # else it writes to the home
    import pulsegrad

    untouched = _process_wide()
    session = pulsegrad.watch(job.model, job.optimizer, k=1)
    hooked = _process_wide()
    push, last = session.store.push_step, [0]

    def counted(meta: object, stats: object) -> None:
        last[0] = sum(bool(row.values) for row in stats.flat)
        push(meta, stats)

    @contextmanager
    def active() -> Iterator[None]:
        _put_process_wide(hooked)
        try:
            yield
        finally:
            _put_process_wide(untouched)

    def close() -> None:
        _put_process_wide(hooked)
        session.close()

    session.store.push_step = counted
    _put_process_wide(untouched)
    return Attached(active=active, read=lambda: last[0], kinds=("output", "parameter", "parameter.grad"), close=close)


_HOOKS = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
    optimizers._global_optimizer_pre_hooks,
    optimizers._global_optimizer_post_hooks,
)


def _process_wide() -> tuple[list[dict], Callable[..., object]]:
    """What pulsegrad changes for all models of a process: global hooks, and `backward`."""
    return [dict(hooks) for hooks in _HOOKS], Tensor.backward


def _put_process_wide(state: tuple[list[dict], Callable[..., object]]) -> None:
    """Bring a state back: the bare loop beside it is to run as if there were no pulsegrad."""
    for hooks, saved in zip(_HOOKS, state[0], strict=True):
        hooks.clear()
        hooks.update(saved)
    Tensor.backward = state[1]
