"""The one class that owns time: closes steps, drains rows when they arrive, asks the triggers, and dumps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _launch, _publish, triggers
from ._blackbox import BlackBox, described
from ._checkpoint import packed, unpacked
from ._dump import header_of, report_of
from ._given import checked_scalar
from ._history import History
from ._log import log
from ._names import safe_text
from ._ring import RingBuffer
from ._schema import Failure, Report
from ._settings import box_folders, check, engine
from ._sigterm import SigtermWatch
from ._update import UpdateWatch
from .errors import BadSetting, NobsError, NobsWarning, TrainingFailure, explain

Result = TypeVar("Result")


def _never_fatal(method: Callable[..., Result]) -> Callable[..., Result | None]:
    """An error of nobs itself is logged once and ends the recording, never the run. Wrong calls do raise."""

    @wraps(method)
    def guarded(self: Recorder, *args: Any, **kwargs: Any) -> Result | None:
        if self._broken:
            return None
        try:
            return method(self, *args, **kwargs)
        except NobsError:
            raise
        except Exception as error:
            self._give_up(error)
            return None

    return guarded


class Recorder:
    """Records an instrumented model step by step, and reports when the run fails.

        with nobs.Recorder(model, optimizer=optimizer) as recorder:
            for x, y in loader:
                ...
                recorder.step(loss)

    On a failure the dump is written under `directory`, the report is printed to stderr (rank 0), and `TrainingFailure` is
    raised. The same dump is written when any other exception leaves the `with` block, and on SIGTERM. What takes the process
    along leaves the black box: a file that each row is written to as it arrives, for `nobs show`, `watch` and `recover`.

    Args:
        model: a model that went through `nobs.instrument`, wrapped or not.
        optimizer: one or a list; its learning rate is recorded as the optimizer was about to use it.
        scaler: the GradScaler, so that gradients are reported unscaled and the steps it skips are no alarm.
        capacity: how many steps to remember.
        triggers: what judges each row, in place of `nobs.triggers.DEFAULT` (with several optimizers, of `SEVERAL`).
        directory: where dumps go, as `<directory>/<run>/step<NNNNNNNN>/rank<NNNNN>.json` and `.png`.
        blackbox: whether to keep one, as `<directory>/<run>/rank<NNNNN>.blackbox`; or another directory for it.
        durable: wait for the disk after each row, for a machine that may lose power. The black box survives anything that
            kills the process without that.
        on_failure: "raise"; "warn" to report, warn and go on (at most one report every `capacity` steps); "stop" to report
            and leave the `with` block quietly, with the report in `recorder.report`.

    Raises:
        NotInstrumented, BadSetting: at once, for a wrong call. Any other error, of nobs or of a trigger, is said once (a warning
            and a log entry) and ends the recording, never the run.

    Memory: `capacity x (3 + taps) x 32` bytes on the host, and as much on an accelerator; on disk about as much, taken with the
    first row.
    """

    report: Report | None
    """The report of the last failure."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        scaler: Any = None,
        capacity: int = 100,
        triggers: Sequence[triggers.Trigger] | None = None,
        directory: str | Path = "crashes",
        blackbox: bool | str | Path = True,
        durable: bool = False,
        on_failure: str = "raise",
    ) -> None:
        check(model, directory, blackbox, durable, on_failure)
        self._ring = RingBuffer(model, capacity=capacity)
        self._update = UpdateWatch(self._ring.row, optimizer, scaler)
        self._engine = engine(triggers, self._update.optimizers)
        self._update.attach()
        self._ring.facts = self._update.facts()
        run = _launch.run_name()
        self._run_directory = Path(directory) / run
        folders = box_folders(blackbox, self._run_directory)
        self._box = BlackBox(folders, partial(header_of, self._ring, self._engine.triggers), durable)
        self._on_failure = on_failure
        self._step = 0
        self._mute_until = 0
        self._off = _launch.disabled()
        self._broken = self._off
        self._sigterm = SigtermWatch(self._dump_signal)
        self.report = None

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float, *, batch: object = None, **scalars: Tensor | float) -> None:
        """Close the step that has just run. Call it once per optimizer step, anywhere behind `loss.backward()`.

        Args:
            loss: a tensor with one element, on any device, or a number. It is not waited for.
            batch: whatever names the batch (indices, a file name); its text is in the report.
            scalars: further numbers of this step.

        Raises:
            BadLoss: the loss, or another scalar, is not a single number.
            TrainingFailure: a trigger found this step, or an earlier one that has only now arrived, to have failed.

        Cost: a few kernel launches and a few NumPy calls. Never waits for the device.
        """
        if not self._broken:
            given = {"loss": checked_scalar("loss", loss)}
            for name, value in scalars.items():
                given[name] = checked_scalar(name, value)
            self._close_step(given, batch)
            self._judge()

    def skip(self) -> None:
        """Forget what ran since the last step, for a batch that you drop: behind `if not loss.isfinite(): continue`, say.

        Without it the forward of the dropped batch would count for the next step.
        """
        self._ring.row.blank()
        self._update.forget()

    @_never_fatal
    def _close_step(self, given: Mapping[str, Tensor | float], batch: object) -> None:
        if self._ring.row.broken is not None:
            raise self._ring.row.broken
        self._ring.close_step(self._step, {"loss": given["loss"], **self._update.take(), **given}, batch)
        self._step += 1

    def _judge(self) -> None:
        """Show every row that has arrived to the triggers, in order; a lag of some rows is normal on an accelerator."""
        while (failure := self._next_failure()) is not None:
            if failure.step >= self._mute_until:
                self._fail(replace(failure, detected_at=self._step - 1))

    @_never_fatal
    def _next_failure(self) -> Failure | None:
        for number, row in self._ring.arrivals():
            self._box.write(row, number)  # first: whatever happens to the process from here on, the row is there
            try:
                failure = self._engine.check(row)
            except NobsError as error:  # in a trigger it is no wrong call of the training loop's
                raise RuntimeError(str(error)) from error
            if failure is not None:
                return failure
        return None

    # -- reading ---------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait for all rows that are on their way, and judge them. May raise `TrainingFailure`, like `step`."""
        self._wait()
        self._judge()

    @_never_fatal
    def _wait(self) -> None:
        self._ring.wait()

    @property
    def blackbox(self) -> Path | None:
        """Where the black box is; None before the first row, and where there is none."""
        return self._box.path

    def history(self) -> History:
        """The last `capacity` steps. Waits for rows that are on their way."""
        return self._ring.history()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside this block: a validation run with gradients, a probe. One more compiled graph."""
        self._ring.row.pause(True)
        try:
            yield
        finally:
            self._ring.row.pause(False)

    def state_dict(self) -> dict[str, Any]:
        """The step number and what the triggers have learned, for a checkpoint. Loads with `weights_only=True`."""
        return {} if self._off else {"step": self._step, "triggers": packed(self._engine.state())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the step of a checkpoint, with what the triggers had learned.

        Raises:
            BadSetting: the state is of other triggers, or of something else.
        """
        if self._off or state == {}:  # this run, or the saved one, has NOBS_DISABLE=1
            return
        if not (isinstance(state, Mapping) and isinstance(state.get("step"), int) and isinstance(state.get("triggers"), list)):
            what = f"a state with the keys {list(state)[:5]}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
            raise BadSetting(
                explain("recorder.load_state_dict(state)", what, "what recorder.state_dict() gave", 'checkpoint["recorder"], say')
            )
        self._engine.load_state(unpacked(state["triggers"]))
        self._step = state["step"]
        self._ring.row.go_to(self._step)
        self._mute_until = 0

    # -- failing ---------------------------------------------------------------------------------------------------

    @_never_fatal
    def dump(self, reason: str = "manual") -> Path | None:
        """Write the last steps as JSON and PNG now; the path of the JSON, None where no folder could be written to."""
        path = _publish.write(report_of(self._ring, reason), self._run_directory)
        self._box.tell(dump=str(path) if path else None)
        return path

    def _fail(self, failure: Failure) -> None:
        self._box.failed(failure, "running" if self._on_failure == "warn" else "failed")  # first: the dump may find no room
        self._wait()
        report = self._report("trigger", failure)
        self._mute_until = self._step + self._ring.capacity
        if self._on_failure == "warn":
            warnings.warn(f"training failed: {report.summary()}", NobsWarning, stacklevel=4)
        else:
            raise TrainingFailure(report)

    def _report(self, reason: str, failure: Failure | None = None, exception: str | None = None) -> Report:
        """Make the report, and publish it; wherever its files are, the black box knows."""
        self.report = report = report_of(self._ring, reason, failure, exception)
        path = _publish.publish(report, self._run_directory)
        self._box.tell(dump=str(path) if path else None)
        return report

    def _give_up(self, error: Exception) -> None:
        """Stop recording for good, and say so once."""
        self._broken = True
        self._ring.row.give_up(error)
        log.error("nobs failed and stopped recording; the training goes on", exc_info=error)
        warnings.warn(
            f"nobs stopped recording, the training goes on: {type(error).__name__}: {safe_text(error)}", NobsWarning, stacklevel=4
        )

    # -- the with block --------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if not self._off:
            self._update.attach()
            self._sigterm.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if self._sigterm.in_child:  # a forked worker on its way out: it never writes
            return False
        ended = _how_it_ended(error, self.report)
        try:
            if error is None:
                self.flush()
            elif not isinstance(error, TrainingFailure) and not _is_clean_exit(error):
                self._box.tell(**ended)  # first: the dump may find no room
                self._dump_escaped(ended["exception"])
        except TrainingFailure as failure:
            ended = {"state": "failed"}
            if self._on_failure != "stop":
                raise
            error = failure
        finally:
            self._close(ended)
        return isinstance(error, TrainingFailure) and error.report is self.report and self._on_failure == "stop"

    @_never_fatal
    def _dump_escaped(self, exception: str) -> None:
        """Dump what led to an exception, the half step that it ended included: its forward ran, and tells the most."""
        try:
            if float(self._ring.row.clock) > 0:  # waits for the device; the run is over
                self._ring.close_step(self._step, self._update.take())
        except Exception:  # after a CUDA error nothing can be launched any more
            log.debug("nobs could not read the last, unfinished step", exc_info=True)
        self._report("exception", exception=exception)

    @_never_fatal
    def _dump_signal(self) -> None:
        self._box.tell(state="sigterm")  # and no rows: it may just have been writing one
        self._report("sigterm")

    def _close(self, ended: Mapping[str, str]) -> None:
        self._update.detach()
        self._sigterm.stop()
        self._keep_the_rest()
        self._box.tell(**ended)

    @_never_fatal
    def _keep_the_rest(self) -> None:
        """What the black box has not got yet: rows behind a failure, the half step of an exception, a row that Ctrl-C met."""
        for number, row in self._ring.rows(since=self._box.rows):
            self._box.write(row, number)


def _how_it_ended(error: BaseException | None, report: Report | None) -> dict[str, str]:
    """What the black box says of a run that an error, or none, has ended."""
    if error is None or _is_clean_exit(error):
        return {"state": "ended"}
    if isinstance(error, TrainingFailure) and error.report is report:
        return {"state": "failed"}
    return {"state": "exception", "exception": described(error)}  # another recorder's failure too


def _is_clean_exit(error: BaseException) -> bool:
    return isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and error.code in (None, 0))
