"""The way of a row from the device to the host: a copy and an event on an accelerator, nothing but the copy on a CPU."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Link(Protocol):
    """The way of a row from the device to the host; `host` is `[capacity, lines, 8]` float32 in CPU memory, `rows` the same."""

    host: Tensor
    rows: NDArray[np.float32]

    def send(self, values: Tensor, place: int) -> None: ...
    def arrived(self, place: int) -> bool: ...
    def wait(self, place: int) -> None: ...


class HostLink:
    """For a model on the CPU: one copy, and it has arrived."""

    def __init__(self, capacity: int, values: Tensor) -> None:
        self.host = torch.zeros(capacity, *values.shape, dtype=torch.float32, device="cpu")
        self.rows = self.host.numpy()

    def send(self, values: Tensor, place: int) -> None:
        self.rows[place] = values.numpy()  # half the time of the same copy in torch

    def arrived(self, place: int) -> bool:
        return True

    def wait(self, place: int) -> None:
        pass


class PinnedLink:
    """For an accelerator: device ring, pinned rows, one event a row."""

    def __init__(self, capacity: int, values: Tensor) -> None:
        self.ring = torch.zeros(capacity, *values.shape, dtype=torch.float32, device=values.device)
        self.host = torch.zeros(capacity, *values.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        self.rows = self.host.numpy()
        self._events = [torch.Event(values.device) for _ in range(capacity)]

    def send(self, values: Tensor, place: int) -> None:
        # On the training's own stream: order against the taps and against the row's reset needs no further event.
        self.ring[place].copy_(values)
        self.host[place].copy_(self.ring[place], non_blocking=True)  # pinned, so that the host does not wait
        self._events[place].record()

    def arrived(self, place: int) -> bool:
        return bool(self._events[place].query())  # asks, does not wait

    def wait(self, place: int) -> None:
        self._events[place].synchronize()


def link_for(values: Tensor, capacity: int) -> Link:
    """The link for the device that the row is on."""
    return HostLink(capacity, values) if values.device.type in ("cpu", "meta") else PinnedLink(capacity, values)
