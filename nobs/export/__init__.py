"""A report in the formats of other programs. One file a format, each a pure function from a frozen report to bytes.

To add one: a file here, a row in FORMATS and a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .._schema import Report
from . import _csv, _npz, _tensorboard, _trace


@dataclass(frozen=True)
class Format:
    """A format of another program.

    Attributes:
        content: the bytes of its one file.
        suffix: what its files, or folders, end in.
        text: whether it is text in UTF-8, and so may go to stdout.
        inside: the name of the file in its folder; None where the file is all there is.
    """

    content: Callable[[Report], bytes]
    suffix: str
    text: bool = False
    inside: str | None = None

    def file(self, output: Path) -> Path:
        """Where the bytes go, for an output that is a file or a folder."""
        return output / self.inside if self.inside else output


FORMATS: Mapping[str, Format] = {
    "csv": Format(_csv.content, ".csv", text=True),
    "npz": Format(_npz.content, ".npz"),
    "trace": Format(_trace.content, ".trace.json", text=True),
    "tensorboard": Format(_tensorboard.content, ".tensorboard", inside=_tensorboard.FILE),
}
