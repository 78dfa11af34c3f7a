"""The one class that owns time: closes steps, drains rows when they arrive, asks the triggers, and dumps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from . import _announce, _group, _launch, _publish, triggers
from ._blackbox import BlackBox
from ._board import Alarm
from ._checkpoint import packed, unpacked
from ._dump import alarm_of, header_of, report_of, report_of_called
from ._ending import how_it_ended, is_clean_exit
from ._given import checked_scalar
from ._history import History
from ._log import log, say
from ._lookout import Lookout
from ._names import safe_text
from ._never_fatal import never_fatal
from ._ring import RingBuffer
from ._schema import Failure, Report
from ._settings import box_folders, check, engine
from ._sigterm import SigtermWatch
from ._update import UpdateWatch
from .errors import BadSetting, NobsError, NobsWarning, TrainingFailure, explain


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
        self._off = _launch.disabled()
        board, run = (None, _launch.run_name()) if self._off else _group.board_of(_launch.run_name())
        self._run_directory = Path(directory) / run
        self._lookout = Lookout(board, _group.rank(), _group.world_size(), capacity, self._dump_called)
        self._lookout.start()
        folders = box_folders(blackbox, self._run_directory)
        self._box = BlackBox(folders, partial(header_of, self._ring, self._engine.triggers), durable)
        self._on_failure = on_failure
        self._step = 0
        self._mute_until = 0
        self._broken = self._off
        self._leaving = False
        self._sigterm = SigtermWatch(self._dump_signal)
        self._dumped: Path | None = None
        self.report = None

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None, *, batch: object = None, **scalars: Tensor | float) -> None:
        """Close the step that has just run. Call it once per optimizer step, anywhere behind `loss.backward()`.

        Args:
            loss: a tensor with one element, on any device, or a number. It is not waited for. None on a rank that has none: an
                earlier stage of a pipeline.
            batch: whatever names the batch (indices, a file name); its text is in the report.
            scalars: further numbers of this step.

        Raises:
            BadLoss: the loss, or another scalar, is not a single number.
            TrainingFailure: a trigger found this step, or an earlier one that has only now arrived, to have failed. With several
                ranks all raise it behind the same step, which is a few steps later at most, so that none waits for another.

        Cost: a few kernel launches and a few NumPy calls. Never waits for the device.
        """
        if not self._broken:
            given = {} if loss is None else {"loss": checked_scalar("loss", loss)}
            for name, value in scalars.items():
                given[name] = checked_scalar(name, value)
            self._close_step(given, batch)
            self._judge()
        self._heed()

    def skip(self) -> None:
        """Forget what ran since the last step, for a batch that you drop: behind `if not loss.isfinite(): continue`, say.

        Without it the forward of the dropped batch would count for the next step.
        """
        self._ring.row.blank()
        self._update.forget()

    @never_fatal
    def _close_step(self, given: Mapping[str, Tensor | float], batch: object) -> None:
        if self._ring.row.broken is not None:
            raise self._ring.row.broken
        self._leaving = False
        self._ring.close_step(self._step, {"loss": given.get("loss"), **self._update.take(), **given}, batch)
        self._step += 1

    def _judge(self) -> None:
        """Show every row that has arrived to the triggers, in order; a lag of some rows is normal on an accelerator."""
        while (failure := self._next_failure()) is not None:
            if failure.step >= self._mute_until:
                with self._sigterm.held():
                    self._fail(replace(failure, detected_at=self._step - 1))

    @never_fatal
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

    @never_fatal
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

    @never_fatal
    def dump(self, reason: str = "manual") -> Path | None:
        """Write the last steps as JSON and PNG now; the path of the JSON, None where no folder could be written to."""
        self._tell_dump(_publish.write(report_of(self._ring, reason), self._run_directory))
        return self._dumped

    def _fail(self, failure: Failure) -> None:
        self._box.failed(failure, "running" if self._on_failure == "warn" else "failed")  # first: the dump may find no room
        if self._lookout.heard:  # another rank was quicker: this one is dumped with it
            return
        self._lookout.call(alarm_of(self._ring, failure.message, failure.step, stop=self._on_failure != "warn"), self._step)
        self._wait()
        report = self._report("trigger", failure)
        self._mute_until = self._step + self._ring.capacity
        if not self._lookout.heard:  # else `_heed` does the rest
            self._say_failed(report, 5)

    def _say_failed(self, report: Report, stacklevel: int) -> None:
        if self._on_failure != "warn":
            self._leaving = True
            raise TrainingFailure(report)
        warnings.warn(f"training failed: {report.summary()}", NobsWarning, stacklevel=stacklevel)

    def _heed(self, last: bool = False) -> None:
        """Do as an alarm asks, this rank's or another's: stop when all can (at once behind the last step), or warn."""
        if not self._lookout.due(self._step, last):
            return
        with self._sigterm.held():
            if self._on_failure != "warn":
                self._box.tell(state="failed")
            linger = self._on_failure != "warn" and not self._lookout.gone  # else rank 0 may hang in a collective, for ever
            _announce.show_together(self._lookout, self.report, self._dumped, self._run_directory, linger=linger)
        self._lookout.done()
        self._mute_until = self._step + self._ring.capacity
        if self.report is not None:
            self._say_failed(self.report, 4)

    def _dump_called(self, alarm: Alarm) -> None:
        """Another rank failed: write what this one has. Called in the lookout's thread; host memory only."""
        self.report = report = report_of_called(self._ring, alarm)
        if report.failure is not None:
            self._box.failed(report.failure, "running")
        self._tell_dump(_publish.write(report, self._run_directory, picture=False))
        if alarm.gone and report.rank == 0:
            say(f"nobs: {report.summary()}; all ranks: nobs merge {self._run_directory}")

    def _report(self, reason: str, failure: Failure | None = None, exception: str | None = None) -> Report:
        """Make the report, and write it; print it, if no other rank has a word in it."""
        self.report = report = report_of(self._ring, reason, failure, exception)
        self._tell_dump(_publish.write(report, self._run_directory))
        if not self._lookout.heard:
            _announce.show(report, self._dumped)
        return report

    def _tell_dump(self, path: Path | None) -> None:
        """Wherever the files of a report are, the black box knows."""
        self._dumped = path
        self._box.tell(dump=str(path) if path else None)

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
            self._lookout.start()
            self._sigterm.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if self._sigterm.in_child:  # a forked worker on its way out: it never writes
            return False
        ended = how_it_ended(error, self.report)
        try:
            if error is None:
                self.flush()
                self._heed(last=True)
            elif not isinstance(error, TrainingFailure) and not is_clean_exit(error):
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

    @never_fatal
    def _dump_escaped(self, exception: str) -> None:
        """Dump what led to an exception, the half step that it ended included: its forward ran, and tells the most."""
        try:
            if float(self._ring.row.clock) > 0:  # waits for the device; the run is over
                self._ring.close_step(self._step, self._update.take())
        except Exception:  # after a CUDA error nothing can be launched any more
            log.debug("nobs could not read the last, unfinished step", exc_info=True)
        with self._sigterm.held():
            if not self._lookout.gone:  # else it is most likely the want of the rank that is gone, and this one is dumped with it
                self._lookout.call(alarm_of(self._ring, exception), self._step)
                self._report("exception", exception=exception)
            if self._lookout.heard:
                _announce.show_together(self._lookout, self.report, self._dumped, self._run_directory, linger=False)

    @never_fatal
    def _dump_signal(self) -> None:
        if not self._leaving:  # else there is a dump already
            self._box.tell(state="sigterm")  # and no rows: it may just have been writing one
            self._report("sigterm")

    def _close(self, ended: Mapping[str, str]) -> None:
        self._update.detach()
        self._sigterm.stop()
        self._keep_the_rest()
        self._box.tell(**ended)
        self._lookout.stop()

    @never_fatal
    def _keep_the_rest(self) -> None:
        """What the black box has not got yet: rows behind a failure, the half step of an exception, a row that Ctrl-C met."""
        for number, row in self._ring.rows(since=self._box.rows):
            self._box.write(row, number)
