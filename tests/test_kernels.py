"""The kernels: one read, folded in place. What they measure is tested in test_stats; here is where they run, and where not."""

import logging
import threading

import pytest
import torch
from nets import Images, Tokens, loss_of
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from twin import reference

import nobs
from nobs import _kernels, _stats
from nobs._columns import FIRST, NORM
from nobs._kernels import _cpu, _cuda

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: Triton compiles for nothing else")


@pytest.fixture
def uncompiled(monkeypatch):
    """No compiler, and no kernel compiled so far."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    _cpu.library.cache_clear()
    yield
    _cpu.library.cache_clear()


def recorded(model, call):
    """The row of one step."""
    ring = nobs.RingBuffer(model)
    torch.manual_seed(0)
    loss_of(call, model.batch()).backward()
    model.zero_grad()
    ring.add(0, 0.0)
    return next(ring.drain())


def test_without_a_compiler_torch_measures(uncompiled, caplog):
    """The log says so, once, and the numbers are the same."""
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "nobs"):
        model = nobs.instrument(Images())
        slow = recorded(model, model)
    assert _cpu.library() is None
    assert "no C++ compiler (no-such-compiler)" in caplog.text
    nobs.uninstrument(model)
    _cpu.library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX")
        nobs.instrument(model)
        fast = recorded(model, model)
        assert _cpu.library() is not None
    torch.testing.assert_close(torch.from_numpy(fast.values), torch.from_numpy(slow.values), rtol=1e-5, atol=0, equal_nan=True)


def test_a_run_that_is_disabled_compiles_nothing(uncompiled, monkeypatch):
    """NOBS_DISABLE=1: nothing will ever be measured."""
    monkeypatch.setenv("NOBS_DISABLE", "1")
    nobs.Recorder(nobs.instrument(Images()))
    assert _cpu.library.cache_info().currsize == 0


@pytest.mark.parametrize("compiler", ["/bin/false", "/bin/true", "'"])
def test_a_compiler_that_fails_ends_nothing(compiler, uncompiled, monkeypatch, caplog):
    """It says no, or says yes and writes nothing, or nobody can tell what it is."""
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO, "nobs"):
        assert _cpu.library() is None
    assert "measures with torch's operations" in caplog.text


def test_where_openmp_is_not_known(uncompiled, monkeypatch, tmp_path):
    """The next flags are tried."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -DOPTIONS_OF_THE_USER")
    assert _cpu.library() is not None


def test_a_graph_without_kernels(fresh_dynamo, monkeypatch):
    """What other devices do: the arithmetic itself is in the graph, and says the same as the kernel."""
    torch.manual_seed(0)
    model = Tokens(depth=1)
    with torch._functorch.config.patch(enable_autograd_cache=False):  # which knows the tap by its name only
        rows = []
        for kernels in (True, False):
            monkeypatch.setattr(_kernels, "one_operator", lambda x, there=kernels: there)
            torch._dynamo.reset()
            nobs.instrument(model)
            rows.append(recorded(model, torch.compile(model, fullgraph=True, backend="aot_eager")))
            nobs.uninstrument(model)
    torch.testing.assert_close(*(torch.from_numpy(row.values) for row in rows), rtol=1e-5, atol=0, equal_nan=True)


def test_one_operator_a_tap(fresh_dynamo):
    """A compiled graph has two operators of nobs a layer, forward and backward, and no arithmetic."""
    calls = []

    def count(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    model = nobs.instrument(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    torch.compile(model, backend=aot_autograd(fw_compiler=count, bw_compiler=count))(torch.ones(2, 4)).sum().backward()
    ours = [call for call in calls if "nobs" in call or "auto_functionalized" in call]
    assert len(ours) == 4
    assert not [call for call in calls if "amax" in call or "sqrt" in call]


def test_half_images_compiled_on_a_cpu(fresh_dynamo):
    """A kernel that reads the gradient of a norm's output would make Inductor transpose it, which it cannot in bfloat16."""
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64))
    model = nn.Sequential(norm, nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(64, 64, 3, padding=1, bias=False))
    nobs.instrument(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(model)(torch.randn(4, 3, 32, 32)).float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_threads_read_one_tensor(threads):
    """Each its share, the last of them less."""
    x = torch.randn(200_001)
    x[77_777] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        line = _stats.blank(1, "cpu")[0]
        assert _cpu.fold(x, line, None)
    finally:
        torch.set_num_threads(before)
    expected = reference(x)
    assert float(line[NORM]) == pytest.approx(expected["norm"], rel=1e-6)
    assert -float(line[5]) == pytest.approx(1 / x.numel(), rel=1e-6)


def test_threads_that_fold_into_one_line():
    """No reading of the clock is lost, and no maximum."""
    line, clock = _stats.blank(1, "cpu")[0], torch.zeros(1)

    def folds(begin):
        for i in range(500):
            _kernels.fold(torch.tensor([float(begin + i)]), line, clock)

    threads = [threading.Thread(target=folds, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert float(clock) == 2000
    assert float(line[NORM]) == 3499
    assert -float(line[FIRST]) == pytest.approx(1 + 1 / 16)


def test_every_half_value():
    """All 65,536 of float16 and of bfloat16, each alone: also those that have no leading one."""
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = words.view(dtype)
        row = _stats.blank(1 << 16, "cpu")
        readings = [(values[i : i + 1], i, 1, True) for i in range(1 << 16)]
        assert _cpu.fold_all(row, readings)
        size = values.double().abs()
        finite = size.isfinite()
        assert torch.equal(row[finite, NORM].double(), size[finite])
        assert torch.equal(row[finite, 1].double(), size[finite])
        assert row[~finite, NORM].isnan().all()
        assert torch.equal(row[:, 2] > 0, values.isnan())
        assert torch.equal(row[:, 3] > 0, values == torch.inf)
        assert torch.equal(row[:, 4] > 0, values == -torch.inf)


def test_values_that_are_not_there():
    """A tensor that is zero by agreement has no memory: torch measures it."""
    line = _stats.blank(1, "cpu")[0]
    nothing = torch._efficientzerotensor((3,))
    assert not _cpu.fold(nothing, line, None)
    assert not _cpu.fold_all(line.unsqueeze(0), [(nothing, 0, 1, True)])
    _kernels.fold(nothing, line)
    assert float(line[5]) == -1


def test_a_line_that_is_not_fresh_folds():
    """What an earlier update of the step used stands beside what a later one does."""
    row = _stats.blank(2, "cpu")
    row[:, NORM] = 7
    _kernels.fold_all(row, [(torch.ones(1), 0, 1, True), (torch.ones(1), 1, 1, False)])
    assert row[:, NORM].tolist() == [1, 7]


def test_a_tensor_on_another_device_is_an_error_and_no_crash():
    """The kernels are given addresses: those of two devices must never meet."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        _kernels.fold(torch.ones(3, device="meta"), _stats.blank(1, "cpu")[0])
    with pytest.raises((RuntimeError, NotImplementedError)):
        _kernels.fold_all(_stats.blank(1, "cpu"), [(torch.ones(3, device="meta"), 0, 1, True)])


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_triton_says_what_torch_says(dtype):
    """Of one element and of millions, with all that is not finite, together and alone."""
    for count in (0, 1, 31, 8191, 8192, 8193, 3_000_001):
        x = torch.randn(count, device="cuda").to(dtype)
        x[::7] = 0
        for value in (None, torch.nan, torch.inf, -torch.inf):
            if value is not None:
                x[1::5] = value
            row = _stats.blank(2, "cuda")
            clock = torch.zeros(1, device="cuda")
            _kernels.fold(x, row[0], clock)
            _kernels.fold_all(row, [(x, 1, 1, True)])
            expected = torch.maximum(_stats.blank(1, "cpu")[0], _stats.measure(x.cpu(), 1))
            for line in row.cpu():
                torch.testing.assert_close(line, expected, rtol=2e-6, atol=0, equal_nan=True)
            assert float(clock) == 1


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_one_launch_a_tap_and_two_for_all_parameters():
    """As the profiler counts them."""
    assert _cuda.library() is not None
    x, row = torch.randn(1 << 20, device="cuda"), _stats.blank(3, "cuda")
    readings = [(x, 0, 1, True), (x[:100], 1, 1, True)]
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            _kernels.fold(x, row[2])
            _kernels.fold_all(row, readings)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.name in ("fold", "read_all", "fold_all")]
    assert sorted(launched) == ["fold", "fold_all", "read_all"]
