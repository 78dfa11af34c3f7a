"""All Hypothesis strategies."""

import numpy as np
from hypothesis import strategies as st

from nobs._columns import COLUMNS, DTYPES, KINDS
from nobs._history import History
from nobs._schema import Failure, Finding, Report
from nobs._table import Tap, TapTable

any_float32 = st.floats(width=32, allow_nan=True, allow_infinity=True)
any_float = st.floats(allow_nan=True, allow_infinity=True)
awkward_text = st.text(max_size=12) | st.sampled_from(["[red]x[/]", "../../etc", "\x1b[2J", "a\nb", "[/]", "layers.0"])


@st.composite
def tables(draw):
    """A few layers with an output and a parameter each, of any names."""
    names = draw(st.lists(awkward_text, min_size=1, max_size=3, unique=True))
    taps = []
    for name in names:
        for kind, site in zip(KINDS, ("output", "output.grad", "weight", "weight.grad"), strict=True):
            taps.append(Tap(name, draw(awkward_text), site, kind))
    return TapTable(tuple(taps))


@st.composite
def histories(draw):
    """Any floats in any line; the taps that ran have whole clocks, distinct between layers, with a dtype behind them."""
    table = draw(tables())
    steps = draw(st.integers(0, 4))
    values = np.zeros((steps, len(table), len(COLUMNS)), dtype=np.float32)
    for t in range(steps):
        for line in range(len(table)):
            if draw(st.booleans()):
                values[t, line, :6] = draw(st.lists(any_float32, min_size=6, max_size=6))
                values[t, line, 6] = draw(st.sampled_from([0, 1, 7]))
                values[t, line, 7] = 1 + line // 4 + draw(st.integers(1, len(DTYPES) - 1)) / 16
            else:
                values[t, line, 7] = np.inf
    names = draw(st.lists(awkward_text, max_size=3, unique=True))
    given = {name: np.array(draw(st.lists(st.booleans(), min_size=steps, max_size=steps)), dtype=bool) for name in names}
    scalars = {
        name: np.where(there, np.array(draw(st.lists(any_float, min_size=steps, max_size=steps)), dtype=np.float64), np.nan)
        for name, there in given.items()
    }
    return History(np.arange(steps, dtype=np.int64) + draw(st.integers(0, 10**9)), table, values, scalars, given)


reports = st.builds(
    Report,
    history=histories(),
    reason=awkward_text,
    created=awkward_text,
    nobs_version=awkward_text,
    failure=st.none()
    | st.builds(
        Failure,
        awkward_text,
        st.integers(0, 9),
        awkward_text,
        st.none() | awkward_text,
        st.none(),
        any_float,
        st.none() | any_float,
    ),
    findings=st.lists(
        st.builds(Finding, st.just("overflow"), awkward_text, st.none(), st.none(), st.floats(0, 1), awkward_text, awkward_text),
        max_size=2,
    ).map(tuple),
    exception=st.none() | awkward_text,
)
