"""The black box as a file: what was written comes back bit for bit, and of a damaged file nothing wrong does."""

import contextlib
import copy
import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from deaths import bits
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import any_float, any_float32, awkward_text, tables

import nobs
from nobs import _codec, _find, _parse, cli
from nobs._blackbox import BlackBox, Header, OpenBox, Status, _format, _record, _storage, _writer, read, this_process
from nobs._blackbox._format import PREAMBLE_BYTES, STATUS_BYTES, TAIL_BYTES, Layout
from nobs._blackbox._process import is_alive
from nobs._blackbox._writer import BoxFile
from nobs._columns import COLUMNS, KINDS
from nobs._history import Row
from nobs._schema import Failure
from nobs._table import Tap, TapTable
from nobs.triggers import DEFAULT, settings_of

SITES = ("output", "output.grad", "w", "w.grad")
TABLE = TapTable(tuple(Tap("fc", "Linear", site, kind) for site, kind in zip(SITES, KINDS, strict=True)))
CAPACITY = 4
UNICODE = "ünï→😀\ud800\u202e\x1b[2J"


def header_of(**fields):
    """A header of a small run."""
    triggers = tuple(settings_of(trigger) for trigger in DEFAULT)
    known = Header("0.1.0", "2026-11-23T00:00:00Z", 0, 1, {"device": "cpu"}, CAPACITY, TABLE, triggers, this_process())
    return dataclasses.replace(known, **fields)


def row_of(step):
    """A row that differs from that of any other step in each of its bytes, or nearly."""
    values = np.random.default_rng(step).random((len(TABLE), len(COLUMNS)), dtype=np.float32)
    values[:, 6:] = 10 + step, 1 + step % 7 + 1 / 16
    values[step % 4, 0] = (math.nan, math.inf, 0.0, -0.0)[step % 4]
    scalars = {"loss": 1 / (step + 1), UNICODE: math.nan if step % 2 else 1e300}
    return Row(step, 1e9 + step / 3, scalars, TABLE, values, None if step % 5 == 0 else f"{UNICODE}{step}")


def same(row, other):
    """Whether two rows are the same to the bit."""
    known = (row.step, row.time_s, bits(row.scalars), row.batch, row.values.tobytes())
    return known == (other.step, other.time_s, bits(other.scalars), other.batch, other.values.tobytes())


FAILURES = tuple(
    Failure("NonFinite", step, f"loss is NaN at step {step}", None, None, math.nan, detected_at=step) for step in range(3)
)
STATUSES = [Status(), *(Status(failures=FAILURES[: n + 1], dump=f"/{UNICODE}/{n}") for n in range(3)), Status("failed", FAILURES)]


def written(folder, rows=9, statuses=4):
    """A box that went round, and was told some statuses: open still."""
    file = BoxFile(folder, header_of(), False)
    for step in range(rows):
        file.write(row_of(step))
    for status in STATUSES[1 : 1 + statuses]:
        file.tell(status)
    return file


def only_box(folder):
    """The black box in a folder."""
    (path,) = folder.rglob("*.blackbox")
    return path


def what_is_read(path, told=STATUSES):
    """Read a damaged file: nothing is wrong in what comes, or a clear error does. How many records came, -1 for an error."""
    try:
        box = OpenBox(path)
    except nobs.NobsError:
        return -1
    with box:
        records, damaged = box.records()
        status, header = box.status(), box.header
        followed = box.since(0)
        assert (box.last_time_s() is None) == (not records)
    assert header == header_of()
    assert status in (None, *told)
    for record in (*records, *followed):
        assert same(record.row, row_of(record.number - 1)), record
    assert len(records) + damaged <= CAPACITY + 1
    return len(records)


# -- there and back -----------------------------------------------------------------------------------------------------

any_name = awkward_text | st.text(st.characters(), max_size=90) | st.just("\ud800\udc00")
clocks = st.floats(0, 2**24, width=32) | st.just(math.inf)
counts = st.floats(0, 2**40, width=32)


@st.composite
def rows(draw):
    """Rows of any numbers, names and texts."""
    table = draw(tables())
    lines = [draw(st.tuples(*[any_float32] * 6, counts, clocks)) for _ in table.taps]
    return Row(
        step=draw(st.integers(-(2**62) + 600, 2**62 - 600)),
        time_s=draw(st.floats(allow_nan=False, allow_infinity=False)),
        scalars=draw(st.dictionaries(any_name, any_float, max_size=4)),
        table=table,
        values=np.array(lines, dtype=np.float32),
        batch=draw(st.none() | st.text(st.characters(), max_size=200)),
    )


@given(rows(), st.integers(1, 2**64 - 1))
def test_a_record_comes_back_bit_for_bit(row, number):
    """Any floats, NaN and infinities among them, any names, any text."""
    layout = Layout.of(1, len(row.table), 1)
    raw = _record.encode_record(row, number, layout)
    back = _record.decode_record(_record.checksum(raw) + raw, layout, row.table)
    assert back.number == number
    assert back.left_out == 0
    assert struct.pack("<d", back.row.time_s) == struct.pack("<d", row.time_s)
    assert same(dataclasses.replace(back.row, time_s=0.0), dataclasses.replace(row, time_s=0.0))


@given(
    tables(),
    awkward_text,
    st.integers(0, 2**40),
    st.dictionaries(awkward_text, st.none() | st.booleans() | st.integers(-9, 9) | awkward_text),
)
def test_a_header_comes_back(table, text, whole, run):
    """Any names; settings that are infinite."""
    header = header_of(nobs_version=text, created=text, rank=whole, world_size=whole, run=run, table=table)
    header = dataclasses.replace(header, triggers=((text, {text: math.inf, "patience": 3}), *header.triggers))
    assert _format.decode_header(_format.encode_header(header)) == header


failures = st.builds(
    Failure,
    awkward_text,
    st.integers(0, 2**60),
    any_name,
    st.none() | any_name,
    st.none() | awkward_text,
    any_float.filter(lambda v: v == v),
)


@given(
    st.builds(
        Status,
        st.sampled_from(_format.STATES),
        st.lists(failures, max_size=4).map(tuple),
        st.none() | any_name,
        st.none() | any_name,
    ),
    st.integers(1, 2**64 - 1),
)
def test_a_status_comes_back(status, number):
    """Whatever the texts, as long as they fit."""
    assert _format.decode_status(_format.encode_status(status, number)) == (number, status)


@given(st.text(st.characters(), min_size=1, max_size=4), st.integers(1, 5000))
@example("\x00", 5000)
@example("😀", 5000)
@example("\ud800", 5000)
def test_a_status_that_does_not_fit_is_cut(letters, times):
    """It always fits in the end, and still says what failed where."""
    text = letters * times
    long = Status("failed", tuple(Failure(text, step, text, text, text, 1.0) for step in range(4)), text, text)
    raw = _format.encode_status(long, 7)
    assert len(raw) <= STATUS_BYTES
    _, status = _format.decode_status(raw.ljust(STATUS_BYTES, b"\0"))
    assert [failure.step for failure in status.failures] == [0, 1, 2, 3]
    assert text.startswith(status.failures[3].layer.rstrip("…"))


@given(st.dictionaries(any_name, any_float, max_size=300), st.text(st.characters(), max_size=300))
@example({f"{n:0254}": float(n) for n in range(30)}, "😀" * 200)
@example({"n" * 255: 1.0, "ü" * 128: 2.0, "": 3.0}, "")
@example({f"{n:03}": 0.0 for n in range(175)}, "😀" * 20)
def test_scalars_that_do_not_fit_are_counted(scalars, batch):
    """Those that are there are right, the others counted, the batch's text cut where no room is left for it."""
    layout = Layout.of(1, len(TABLE), 1)
    raw = _record.encode_record(Row(1, 0.0, scalars, TABLE, row_of(1).values, batch), 1, layout)
    assert len(raw) + 4 == layout.record_bytes
    back = _record.decode_record(_record.checksum(raw) + raw, layout, TABLE)
    assert back.left_out + len(back.row.scalars) == len(scalars)
    assert bits(back.row.scalars) == bits({name: scalars[name] for name in back.row.scalars})
    assert batch.startswith(back.row.batch.rstrip("…"))
    used = sum(9 + len(name.encode("utf-8", "surrogatepass")) for name in scalars)
    if used <= TAIL_BYTES - 900 and all(len(name.encode("utf-8", "surrogatepass")) < 256 for name in scalars):
        assert back.left_out == 0
        assert back.row.batch[:199] == batch[:199]


def test_a_nan_that_warns_of_itself_is_read_as_a_plain_one():
    """No tap writes a signalling NaN; a file may hold one, and nobody who judges its row is warned."""
    raw = bytearray(_record.encode_record(row_of(1), 1, Layout.of(0, len(TABLE), 2)))
    raw[_format.HEAD_BYTES - 4 : _format.HEAD_BYTES] = struct.pack("<I", 0x7FA00000)
    back = _record.decode_record(_record.checksum(bytes(raw)) + bytes(raw), Layout.of(0, len(TABLE), 2), TABLE)
    assert math.isnan(back.row.values[0, 0])
    with np.errstate(all="raise"):
        back.row.values + back.row.values


def test_a_ring_that_goes_round(tmp_path):
    """At each length: the last capacity + 1 records, the oldest first, and of them the last `capacity` as history."""
    file = BoxFile(tmp_path, header_of(), False)
    for step in range(23):
        file.write(row_of(step))
        with OpenBox(file.path) as box:
            records, damaged = box.records()
            assert [record.number for record in records] == list(range(step + 2))[1:][-CAPACITY - 1 :]
            assert damaged == 0
            assert all(same(record.row, row_of(record.number - 1)) for record in records)
            assert box.last_time_s() == row_of(step).time_s
        history = read(file.path).history
        assert history.steps.tolist() == list(range(max(0, step + 1 - CAPACITY), step + 1))
        assert history.values.tobytes() == np.stack([row_of(i).values for i in history.steps.tolist()]).tobytes()
    assert what_is_read(file.path) == CAPACITY + 1


def test_followers_miss_nothing(tmp_path):
    """`since` gives each record once and in order; where the ring has gone round, all that it holds."""
    file = BoxFile(tmp_path, header_of(), False)
    with OpenBox(file.path) as box:
        last, seen = 0, []
        for burst in (0, 1, 3, 4, 0, 5, 9, 1):
            for _ in range(burst):
                file.write(row_of(file.rows))
            numbers = [record.number for record in box.since(last)]
            assert numbers == list(range(file.rows - min(burst, CAPACITY + 1) + 1, file.rows + 1))
            last = numbers[-1] if numbers else last
            seen += numbers
    with OpenBox(file.path) as box:
        assert [record.number for record in box.since(0)] == list(range(19, 24))


def test_the_latest_time_of_a_ring_that_goes_round_meanwhile(tmp_path, monkeypatch):
    """GIVEN a writer that is faster than its reader, THEN a run that goes on is not taken for one of 1970."""
    file = written(tmp_path)
    at = OpenBox.at

    def late(box, place):
        monkeypatch.setattr(OpenBox, "at", at)
        for _ in range(CAPACITY + 1):
            file.write(row_of(file.rows))
        return at(box, place)

    with OpenBox(file.path) as box:
        monkeypatch.setattr(OpenBox, "at", late)
        assert box.last_time_s() >= row_of(8).time_s


# -- damaged files --------------------------------------------------------------------------------------------------------


def test_truncated_at_every_length(tmp_path, often, counted):
    """A clear error, or the records that are whole."""
    file = written(tmp_path)
    whole, total = file.layout.total_bytes, Counter()
    lengths = range(whole, -1, -often(1, 97))
    if not often(True, False):
        ends = {file.layout.record(place) + more for place in range(CAPACITY + 2) for more in (-1, 0, 1, 4, 64)}
        lengths = sorted({*lengths, *range(0, 60), *range(1600, 1700), *(end for end in ends if end <= whole)}, reverse=True)
    longest_s, most = 0.0, CAPACITY + 1
    for length in lengths:
        os.truncate(file.path, length)
        begin_s = time.perf_counter()
        count = what_is_read(file.path)
        longest_s = max(longest_s, time.perf_counter() - begin_s)
        assert count <= most  # nothing comes back
        most = count
        places = max(0, length - file.layout.records_offset) // file.layout.record_bytes
        assert count == (places if length >= PREAMBLE_BYTES + file.layout.header_bytes else -1)
        total += Counter(lengths=1, errors=count < 0, records_compared=max(count, 0))
    assert longest_s < 1
    counted("truncated", **total)


def flipped(raw, rng):
    """One bit."""
    place = rng.randrange(len(raw))
    raw[place] ^= 1 << rng.randrange(8)


def overwritten(raw, rng):
    """A run of garbage, zeros or ones."""
    begin = rng.randrange(len(raw))
    size = min(int(2 ** rng.uniform(0, 14)), len(raw) - begin)
    raw[begin : begin + size] = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size))


def moved(raw, rng):
    """One stretch in the place of another."""
    size = int(2 ** rng.uniform(0, 13))
    begin, end = (rng.randrange(len(raw) - size) for _ in range(2))
    raw[end : end + size] = raw[begin : begin + size]


@pytest.mark.parametrize(("damage", "endure", "sample"), [(flipped, 10_000, 300), (overwritten, 3000, 150), (moved, 3000, 150)])
def test_damaged_at_random_places(tmp_path, often, counted, damage, endure, sample):
    """Each record that is read is one that was written, and so is the status; or there is a clear error."""
    file = written(tmp_path)
    whole, rng, total = file.path.read_bytes(), random.Random(damage.__name__), Counter()
    for _ in range(often(endure, sample)):
        raw = bytearray(whole)
        damage(raw, rng)
        file.path.write_bytes(raw)
        count = what_is_read(file.path)
        total += Counter(files=1, errors=count < 0, records_compared=max(count, 0))
        if raw != whole and damage is flipped:
            assert count != CAPACITY + 1 or not _in_a_record(raw, whole, file.layout)
    counted(f"{damage.__name__} at random places", **total)


def _in_a_record(raw, whole, layout):
    return raw[layout.records_offset :] != whole[layout.records_offset :]


def test_pages_of_different_ages(tmp_path, often, counted):
    """GIVEN a machine that lost power, which wrote back some pages and not others, THEN each record read was once written."""
    file, snapshots = BoxFile(tmp_path, header_of(), False), []
    told = iter(STATUSES[1:])
    for step in range(12):
        file.write(row_of(step))
        if step % 3 == 0:
            file.tell(next(told))
        snapshots.append(file.path.read_bytes())
    blank, total, rng = bytes(len(snapshots[0])), Counter(), random.Random(0)
    for _ in range(often(5000, 200)):
        ages = [rng.choice((snapshots[-1], snapshots[-1], rng.choice((blank, *snapshots)))) for _ in range(0, len(blank), 4096)]
        file.path.write_bytes(b"".join(age[4096 * i : 4096 * (i + 1)] for i, age in enumerate(ages)))
        count = what_is_read(file.path)
        if count >= 0:
            steps = read(file.path).history.steps.tolist()
            assert steps == sorted(set(steps))
            assert not steps or steps[-1] - steps[0] < CAPACITY
        total += Counter(files=1, errors=count < 0, records_compared=max(count, 0))
    counted("pages of different ages", **total)


@pytest.mark.parametrize("content", [b"", b"\0" * 60000, b"\x89nobsbox", b"\x89nobsbox" * 9000, b"{}", os.urandom(60000)])
def test_files_of_other_kinds(tmp_path, content, capsys):
    """A clear error, whatever the name."""
    for name in ("rank00000.blackbox", "dump.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(nobs.NobsError, match="expected"):
            nobs.load(tmp_path / name)
        assert cli.main(["show", str(tmp_path / name)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@contextlib.contextmanager
def in_time(longest_s):
    """What takes longer is ended with an error."""

    def late(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, longest_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_pipes_and_folders(tmp_path):
    """Nobody waits for a pipe, and a folder with the name of a black box is a folder."""
    pipe, folder = tmp_path / "rank00000.blackbox", tmp_path / "folder.blackbox"
    os.mkfifo(pipe)
    folder.mkdir()
    with in_time(10):
        for path in (pipe, folder, tmp_path, tmp_path / "nothing.blackbox", tmp_path / "nul\0.blackbox", tmp_path / ("n" * 300)):
            with pytest.raises(nobs.NobsError):
                nobs.load(path)
            with pytest.raises(nobs.NobsError):
                OpenBox(path)
            assert cli.main(["recover", str(path)]) == 2
    file = written(folder)
    assert nobs.load(folder).history.steps.tolist() == nobs.load(tmp_path).history.steps.tolist() == [5, 6, 7, 8]
    assert _find.find(tmp_path) == file.path


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """A disk that answers with errors: said, and no traceback."""
    file = written(tmp_path)
    with OpenBox(file.path) as box:
        os.close(box._file.fileno())
        with pytest.raises(nobs.NobsError, match="Bad file descriptor"):
            box.status()
        os.dup2(file._descriptor, box._file.fileno())


# -- files that somebody made -------------------------------------------------------------------------------------------


def forged(path, data, layout=None, version=1):
    """A file with a header of one's own, and checksums that are right."""
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    file = written(path.parent)
    layout = layout or Layout.of(len(raw), len(TABLE), CAPACITY + 1)
    records = file.path.read_bytes()[file.layout.status_offset :]
    file.close()
    file.path.unlink()
    preamble = bytearray(_format.encode_preamble(layout, raw))
    preamble[8:12] = struct.pack("<I", version)
    preamble[-4:] = struct.pack("<I", zlib.crc32(preamble[:-4]))
    path.write_bytes((bytes(preamble) + raw).ljust(layout.status_offset, b"\0")[: layout.status_offset] + records)
    return path


HEADER = json.loads(_format.encode_header(header_of()))
hostile = (
    st.none()
    | st.booleans()
    | st.sampled_from(
        [0, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400, 0.5, 1e308, "", "x", "\0", "NaN", "../../x", "\ud800"]
    )
    | st.sampled_from(
        [[], {}, [[]], [None], {"a": None}, [1, 2, 3, 4], ["a", "b", "c", "output"], [["a", {}]], [["NonFinite", {"x": []}]]]
    )
)


def places_in(data):
    """The path to each value in a JSON value."""
    yield ()
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from ((key, *path) for path in places_in(value))


def changed(data, changes):
    """The JSON value with other values in some places, where those still are there."""
    data = copy.deepcopy(data)
    for path, value in changes:
        if not path:
            return value
        with contextlib.suppress(KeyError, IndexError, TypeError):
            inner = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
    return data


PLACES = sorted(places_in(HEADER), key=str)


def clear(path, longest_s=5):
    """A file is read, or refused, in time, and never anything else; what is read can be written as a dump, and read again."""
    with in_time(longest_s):
        for which in (path, path.parent):
            with contextlib.suppress(nobs.NobsError):
                report = nobs.load(which)
                assert len(_parse.loads(_codec.dumps(report)).history) == len(report.history)
        assert cli.main(["show", str(path), "--json"]) in (0, 2)
        assert cli.main(["check", str(path)]) in (0, 1, 2)


@given(st.lists(st.tuples(st.sampled_from(PLACES), hostile), min_size=1, max_size=3))
@example([(("capacity",), 0)])
@example([(("capacity",), 2**63)])
@example([(("taps",), [])])
@example([(("taps", 0), ["fc", "Linear", "weight", "parameter"])])
@example([(("triggers",), [["DeadLayer", {"patience": 10**30}]])])
@example([(("triggers",), [["LossSpike", {"warmup": 1e308, "factor": 1e-300}]])])
def test_hostile_headers(tmp_path_factory, changes):
    """Right checksums around wrong values: read or refused."""
    path = tmp_path_factory.mktemp("forged") / "rank00000.blackbox"
    clear(forged(path, changed(HEADER, changes)))
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("kind", ["10**30", "'a'", "'a\\0'", "-1", "None", "True", "'../../tmp'"])
@pytest.mark.parametrize("started", ["", "1", None, 5])
def test_hostile_processes(tmp_path, kind, started):
    """A process of this machine, so it seems, that can be none."""
    process = {**vars(this_process()), "pid": eval(kind), "started": started}
    clear(forged(tmp_path / "rank00000.blackbox", {**HEADER, "process": process}))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[" * 100_000,
        b"null",
        b"\xff\xfe",
        b'{"format": "nobs.blackbox"}',
        b"1" * 5000,
        json.dumps({**HEADER, "format": "x"}).encode(),
    ],
)
def test_headers_that_are_none(tmp_path, raw):
    """Text that is no JSON, too deep, too long."""
    path = forged(tmp_path / "rank00000.blackbox", raw)
    clear(path)
    with pytest.raises(nobs.NobsError):
        nobs.load(path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"places": 2**32 - 1},
        {"places": 0},
        {"places": CAPACITY - 1},
        {"record_bytes": 0},
        {"record_bytes": 2**32 - 1},
        {"status_bytes": 0},
        {"status_bytes": 2**32 - 1},
        {"header_bytes": 2**32 - 1},
        {"header_bytes": 0},
        {"status_offset": 2**64 - 1},
        {"records_offset": 2**64 - 1},
        {"records_offset": 0},
    ],
)
def test_hostile_sizes(tmp_path, sizes):
    """What a file says of itself costs neither more time nor more memory than it is long."""
    raw = json.dumps(HEADER).encode()
    layout = dataclasses.replace(Layout.of(len(raw), len(TABLE), CAPACITY + 1), **sizes)
    path = tmp_path / "rank00000.blackbox"
    content = bytearray(written(tmp_path).path.read_bytes())
    fields = (layout.header_bytes, zlib.crc32(raw), layout.record_bytes, layout.places, layout.status_bytes)
    preamble = _format._PREAMBLE.pack(_format.MAGIC, 1, *fields, layout.status_offset, layout.records_offset)
    content[: PREAMBLE_BYTES + len(raw)] = preamble + struct.pack("<I", zlib.crc32(preamble)) + raw
    path.write_bytes(content)
    clear(path)
    if sizes != {"places": 2**32 - 1}:  # of which most are cut off
        with pytest.raises(nobs.NobsError):
            nobs.load(path)


def test_a_newer_version_is_told_from_damage(tmp_path):
    """It says what to type."""
    path = forged(tmp_path / "rank00000.blackbox", HEADER, version=2)
    with pytest.raises(nobs.NobsError, match="version 2\n  expected: at most 1\n  type:     pip install --upgrade"):
        nobs.load(path)


texts = st.sampled_from(["", "x", UNICODE, "NaN", "failed", "x" * 3000])
statuses = st.recursive(
    hostile | texts | st.sampled_from([vars(FAILURES[0]) | {"value": "NaN"}]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["state", "failures", "exception", "dump", "step"]), inner)
    ),
    max_leaves=8,
)


@given(statuses | st.fixed_dictionaries({"state": hostile | texts, "failures": statuses, "exception": hostile, "dump": hostile}))
@example(
    {
        "state": "failed",
        "failures": [{"trigger": "", "step": 8, "message": "", "value": 10**400}],
        "exception": None,
        "dump": None,
    }
)
@example({"state": [], "failures": [], "exception": None, "dump": None})
@example({"state": {}, "failures": [], "exception": None, "dump": None})
def test_hostile_statuses(tmp_path_factory, data):
    """Right checksums around wrong values: another status, or none."""
    file = written(tmp_path_factory.mktemp("forged"))
    text = json.dumps(data).encode()
    packed = struct.pack("<IQ", len(text), 99) + text
    file._put(file.layout.status(99), struct.pack("<I", zlib.crc32(packed)) + packed)
    clear(file.path)
    assert read(file.path).status is not None
    shutil.rmtree(file.path.parent)


def records_with(column, value):
    """A row with a number that no tap gives."""
    row = row_of(8)
    row.values[1, column] = value
    return row


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 3e38, 2.0**25, 1e-45])
def test_hostile_numbers(tmp_path, often, value):
    """Read, drawn and printed, or counted as damaged."""
    for column in range(len(COLUMNS)):
        file = written(tmp_path / str(column), rows=8, statuses=0)
        file.write(records_with(column, value))
        clear(file.path)
        assert {5, 6, 7} <= set(nobs.load(file.path).history.steps.tolist())
        if often(True, column == 0):
            assert cli.main(["recover", str(file.path)]) == 0


@pytest.mark.parametrize("time_s", [math.nan, math.inf, -math.inf, 0.0, -1e300, 1e300])
def test_hostile_times_and_steps(tmp_path, often, time_s):
    """Times that are none, and steps beyond what JSON readers take."""
    for step in (-(2**63), 2**63 - 1, 2**62, -(2**62), 2**62 - 513, -1):
        file = written(tmp_path / str(step), rows=8, statuses=0)
        file.write(dataclasses.replace(row_of(8), time_s=time_s, step=step))
        clear(file.path)
        if often(True, step == -1):
            assert cli.main(["recover", str(file.path)]) == 0


# -- the policy around the file -------------------------------------------------------------------------------------------


def box_in(folder, **options):
    return BlackBox([folder], header_of, **options)


def test_a_status_while_the_writer_changes_it(tmp_path):
    """Of two places one is always whole: a torn one costs the last news, not the one before."""
    file = written(tmp_path, statuses=3)
    for torn in (2, 100, 1000):
        file._put(file.layout.status(file._status_number + 1), os.urandom(torn))
        assert read(file.path).status == STATUSES[3]
    file._put(file.layout.status(file._status_number), os.urandom(9))
    recording = read(file.path)
    assert recording.status is None
    assert len(recording.history) == CAPACITY


def test_an_interrupt_while_a_record_is_written(tmp_path, monkeypatch):
    """Ctrl-C lands between two bytecodes of the writing: the row is not lost, as its step had come to an end."""
    from nets import Images
    from runs import run

    model = nobs.instrument(Images())
    checksum = _writer.checksum

    def interrupted(record):
        monkeypatch.setattr(_writer, "checksum", checksum)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 3)
        monkeypatch.setattr(_writer, "checksum", interrupted)
        run(recorder, model, 1)
    recording = read(_find.find_black_box(tmp_path))
    assert recording.history.steps.tolist() == recorder.report.history.steps.tolist() == [0, 1, 2, 3]
    assert recording.damaged == 0


def test_the_failing_row_may_have_left_the_ring(tmp_path, monkeypatch, capsys):
    """GIVEN an accelerator a whole ring behind, THEN a run that failed is not taken for a healthy one."""
    from nets import Images
    from runs import run

    from nobs import _ring
    from nobs._link import HostLink

    class Late(HostLink):
        """A row arrives when it is waited for."""

        def __init__(self, capacity, values):
            super().__init__(capacity, values)
            self.there = set()

        def send(self, values, place):
            super().send(values, place)
            self.there.discard(place)

        def arrived(self, place):
            return place in self.there

        def wait(self, place):
            self.there.add(place)

    monkeypatch.setattr(_ring, "link_for", lambda values, capacity: Late(capacity, values))
    model = nobs.instrument(Images())
    with nobs.Recorder(model, directory=tmp_path, capacity=3, on_failure="stop") as recorder:
        run(recorder, model, 9, loss_at={1: math.nan})
    box = nobs.load(_find.find_black_box(tmp_path))
    assert box.failure == recorder.report.failure
    assert cli.main(["check", str(_find.find_black_box(tmp_path))]) == 1


def test_an_older_exception_is_not_what_ended_the_run(tmp_path, monkeypatch):
    """GIVEN a notebook in which some cell failed before, THEN a recorder that is let go of has ended, and nothing more."""
    monkeypatch.setattr(sys, "last_value", ZeroDivisionError("of an hour ago"), raising=False)
    box = box_in(tmp_path)
    box.write(row_of(0))
    path = box.path
    del box
    assert read(path).status == Status("ended")


class Odd:
    """A trigger that measures with NumPy, as one does."""

    def update(self, state, row):
        odd = row.step == 2
        return state, nobs.Failure("Odd", row.step, "odd", value=np.float32(3), threshold=np.float64(2)) if odd else None


def test_a_trigger_that_answers_in_numpy(model, tmp_path):
    """The black box and the dump take its numbers."""
    from runs import dumps, run

    with nobs.Recorder(model, directory=tmp_path, triggers=[Odd()], on_failure="stop") as recorder:
        run(recorder, model, 5)
    assert recorder.report.failure.step == 2
    assert nobs.load(_find.find_black_box(tmp_path)).failure.value == 3
    assert nobs.load(dumps(tmp_path)[0]).failure.value == 3


def test_no_temporary_folder(model, tmp_path, monkeypatch):
    """GIVEN a container with one writable folder, THEN it is all that nobs needs."""
    from runs import dumps, run

    from nobs import _publish

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(_publish, "tempfile", type("tempfile", (), {"gettempdir": staticmethod(none)}))
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        run(recorder, model, 5, loss_at={2: math.nan})
    assert nobs.load(dumps(tmp_path)[0]).failure == recorder.report.failure
    assert read(_find.find_black_box(tmp_path)).status.state == "failed"


@pytest.mark.parametrize(
    ("value", "step"), [(torch.tensor(3.0), 2), (np.float64(3), np.int64(2)), (3, 2), ("high", 2), (None, None)]
)
def test_a_trigger_that_answers_in_anything(model, tmp_path, value, step, recwarn):
    """Numbers of NumPy and torch are numbers; what is none ends the recording, never the run, and is said."""
    from runs import run

    class Any:
        def update(self, state, row):
            return state, nobs.Failure("Any", step, "any", value=value) if row.step == 2 else None

    with nobs.Recorder(model, directory=tmp_path, triggers=[Any()], on_failure="stop") as recorder:
        run(recorder, model, 5)
    box = nobs.load(_find.find_black_box(tmp_path))
    if value in ("high", None):
        assert "stopped recording" in str(recwarn[0].message)
        assert box.reason == "ended"
    else:
        assert box.failure.value == float(value)
        assert type(box.failure.step) is int


def test_after_an_error_of_the_device(model, tmp_path, monkeypatch, capsys):
    """GIVEN events that nobody can ask any more, THEN what had arrived is in the dump and in the black box."""
    from runs import dumps, run

    with pytest.raises(ZeroDivisionError), nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 4)

        def dead(*place):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        for name in ("arrived", "wait", "send"):
            monkeypatch.setattr(recorder._ring._link, name, dead)
        1 / 0  # noqa: B018
    for path in (dumps(tmp_path)[0], _find.find_black_box(tmp_path)):
        report = nobs.load(path)
        assert report.history.steps.tolist() == [0, 1, 2, 3]
        assert report.exception == "ZeroDivisionError: division by zero"


def test_a_machine_that_started_anew(tmp_path):
    """A process of before the boot is dead; one on another machine may be anything."""
    gone = dataclasses.replace(this_process(), boot="another")
    assert is_alive(gone) is False
    assert is_alive(dataclasses.replace(gone, host="elsewhere")) is None


def test_damaged_neighbours_hide_nothing(tmp_path):
    """GIVEN two damaged records on end, one of which claims another's number, THEN a follower sees each other record once."""
    file = written(tmp_path, rows=CAPACITY, statuses=0)
    for place, number in ((2, 5), (3, 10**9)):
        file._storage.put(file.layout.record(place) + 8, struct.pack("<Q", number))
    clear(file.path)
    with OpenBox(file.path) as box:
        numbers = [record.number for record in box.since(0)]
        assert numbers == [n for n in range(1, CAPACITY + 1) if n not in (3, 4)]
        assert box.records()[1] == 2


@pytest.fixture
def full(monkeypatch):
    """A file system that writes a block anew elsewhere; call it to fill its disk, or to make room."""
    pwrite, room = os.pwrite, [10**9]

    def limited(descriptor, content, offset):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = min(len(content), room[0])
        room[0] -= size
        return pwrite(descriptor, content[:size], offset)

    monkeypatch.setattr(_storage, "IN_PLACE", frozenset())
    monkeypatch.setattr(_storage.os, "pwrite", limited)
    return lambda left: room.__setitem__(0, left)


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("left", [0, 1, 100, 1000])
def test_a_disk_that_is_full_for_a_while(tmp_path, capsys, full, left, numbered):
    """Rows that find no room are not there; those before stay, those behind come, and it is said once."""
    box = box_in(tmp_path)
    for step in range(7):
        box.write(row_of(step), step if numbered else None)
    for step in range(7, 20):
        full(left)
        box.write(row_of(step), step if numbered else None)
    recording = read(box.path)
    assert recording.history.steps.tolist()[-CAPACITY + 1 :] == [4, 5, 6]
    full(10**9)
    for step in range(20, 23):
        box.write(row_of(step), step if numbered else None)
    assert set(read(box.path).history.steps.tolist()) <= {5, 6, 20, 21, 22}
    assert read(box.path).history.steps.tolist()[-3:] == [20, 21, 22]
    assert capsys.readouterr().err.count("No space left on device") == 1


@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_status_that_finds_no_room(tmp_path, full, left):
    """However often: the last that did stays, and all the news come with the next."""
    box = box_in(tmp_path)
    box.write(row_of(0))
    box.failed(FAILURES[0], "running")
    for failure in FAILURES[1:]:
        full(left)
        box.failed(failure, "running")
        assert read(box.path).status == Status(failures=FAILURES[:1])
    full(10**9)
    box.tell(dump="here")
    assert read(box.path).status == Status(failures=FAILURES, dump="here")


def test_a_row_that_cannot_be_written_costs_no_more_than_the_box(tmp_path, capsys):
    """A step beyond 64 bits: said once, and never raised."""
    box = box_in(tmp_path)
    box.write(row_of(0))
    for _ in range(3):
        box.write(dataclasses.replace(row_of(1), step=2**63))
        box.tell(state="failed")
    err = capsys.readouterr().err
    assert err.count("stopped writing its black box") == 1
    assert read(box.path).history.steps.tolist() == [0]
