"""Layer names: cleaned of wrappers, matched against patterns, put in order; any text made harmless for a terminal or a file."""

from __future__ import annotations

import difflib
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")

_LONGEST = 400

ROOT = "(model)"
"""What the model itself is called."""


def clean(name: str) -> str:
    """The name without the parts that torch.compile, checkpoint wrappers and FSDP1 add; the root is ROOT."""
    return _WRAPPERS.sub("", name).strip(".") or ROOT


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a glob pattern fits; a plain name fits itself. `*` crosses dots, case counts."""
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def nearest(name: str, names: Iterable[str], most: int = 5) -> list[str]:
    """The names that somebody who typed `name` may have meant, best first."""
    names = list(names)
    close = difflib.get_close_matches(name, names, most, cutoff=0.5)
    return close or sorted(names, key=lambda n: -difflib.SequenceMatcher(None, name, n).ratio())[:most]


def places(known: Mapping[str, float], layers: Iterable[str]) -> dict[str, float]:
    """layer -> its place in execution; one that never ran itself stands where its parent does, and else last."""
    # Without the root, which ends after everything else and so tells no place.
    return {layer: next((known[name] for name in (layer, *parents(layer)[:-1]) if name in known), math.inf) for layer in layers}


def parents(name: str) -> list[str]:
    """The names of the layers that hold a layer, the innermost first, the root last."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)] + [ROOT] * (name != ROOT)


def printable(text: str) -> str:
    r"""The text with control characters, line breaks, direction marks and lone surrogates shown as `\x1b` and the like.

    Layer names are the user's, dumps may be a stranger's: nothing in them may move the cursor or forge a line.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text)


def safe_text(thing: object, limit: int = 200) -> str:
    """`str(thing)`, shortened; a broken `__str__` must not break a crash report."""
    try:
        text = str(thing)
    except Exception as error:
        text = f"<unprintable {type(thing).__name__}: {type(error).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def cells(text: str) -> int:
    """How many columns of a terminal a text takes: two for wide characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shortened(names: Sequence[str], width: int, ellipsis: str = "…") -> list[str]:
    """The names in at most `width` columns, cut where it does not make two of them alike, if there is such a place.

    In the middle, as a rule: both the block and the layer in it tell names apart. Else further to an end, or what all long
    ones begin with is left out.
    """
    shared = len(os.path.commonprefix([name for name in names if cells(name) > width]))  # noqa: RUF071  # by character
    ways = [[_cut(name, width, ellipsis, share) for name in names] for share in (0.5, 0.7, 0.3, 0.9, 0.1)]
    ways += [[_cut(name, width, ellipsis, 0.5, without=shared) for name in names]]
    return max(ways, key=lambda way: len(set(way)))  # of equals the first


def _cut(name: str, width: int, ellipsis: str, share: float, without: int = 0) -> str:
    """The name in `width` columns, `share` of them for its beginning; cut at all, it loses its first letters first."""
    if cells(name) <= width:
        return name
    if len(name) > _LONGEST:  # a stranger's name may be a book, and is measured letter by letter
        name = name[: _LONGEST // 2] + name[-_LONGEST // 2 :]
    if without:
        return ellipsis + _cut(name[without:], width - 1, ellipsis, share)
    head, tail = 0, len(name)
    while cells(name[: head + 1]) <= int((width - 1) * share):
        head += 1
    while cells(name[tail - 1 :]) <= width - 1 - cells(name[:head]):
        tail -= 1
    return name[:head] + ellipsis + name[tail:]


def file_name(text: str) -> str:
    """The text as one plain file name: letters, digits, dots, dashes; never empty, hidden, or a way out of the folder."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip(".-")[:80] or "run"
