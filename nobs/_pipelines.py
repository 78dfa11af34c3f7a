"""The stages of a pipeline divide their gradients by the number of micro-batches, behind the last backward of a step.

torch tells nobody of it. So the stages that hold some layers are found, once, and what divides is followed.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ._log import complain


def follow_stages(layers: Iterable[nn.Module], divided: Callable[[], None]) -> list[Any]:
    """Have a method called behind each division of the gradients of some layers; the stages that were found.

    Cost: nothing where no pipeline is imported; else a look at all objects that there are, once: some 50 ms. Never raises:
    without it gradients are those of the sum over micro-batches.
    """
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    if pipelining is None:
        return []
    ours = set(map(id, layers))
    try:
        # By type: a stranger's object may answer any question about its class.
        stages: list[Any] = [one for one in gc.get_objects() if issubclass(type(one), pipelining._PipelineStageBase)]
        found = [stage for stage in stages if any(id(module) in ours for module in stage.submod.modules())]
        for stage in found:
            _follow(stage, weakref.WeakMethod(divided))
    except Exception as error:  # it is torch's own, and may be another tomorrow
        complain("could not follow the stages of a pipeline, whose gradients are recorded before they are divided", error)
        return []
    return found


def _follow(stage: Any, divided: weakref.WeakMethod[Callable[[], None]]) -> None:
    plain = stage.scale_grads

    def scale_grads(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        call = divided()
        if call is not None:
            call()
        return result

    stage.scale_grads = scale_grads


def leave_stages(stages: list[Any]) -> None:
    """Take that back."""
    for stage in stages:
        vars(stage).pop("scale_grads", None)
    stages.clear()
