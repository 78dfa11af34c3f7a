"""Gradients of parameters: what the optimizer found, however the loop goes about it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward

import nobs


@pytest.mark.parametrize("to_none", [True, False])
def test_two_updates_in_one_step(to_none):
    """Where gradients are zeroed between two backwards the step shows the worse, and the parameter as the first found it."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    ring = nobs.RingBuffer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms, before = [], model.weight.norm().item()
    for scale in (100.0, 1.0):
        optimizer.zero_grad(set_to_none=to_none)
        (model(torch.ones(2, 3)).sum() * scale).backward()
        norms.append(model.weight.grad.norm().item())
        optimizer.step()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["(model)", "weight.grad", "norm"] == pytest.approx(max(norms), rel=1e-6)
    assert row["(model)", "weight", "norm"] == pytest.approx(before, rel=1e-6)


def test_an_optimizer_inside_the_backward():
    """A hook that updates and drops each gradient at once: it is read before that."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    before = model.weight.norm().item()

    def update(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    model.weight.register_post_accumulate_grad_hook(update)
    ring = nobs.RingBuffer(model)
    model(torch.ones(2, 3)).sum().backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["(model)", "weight.grad", "norm"] == pytest.approx(2 * 3**0.5, rel=1e-6)
    assert row["(model)", "weight", "norm"] == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("zeroed", ["before its backward", "behind its step"])
def test_a_generator_and_a_discriminator(fused, zeroed, tmp_path):
    """Each half of a GAN shows the gradient that its own optimizer found, and not what the other's loss left in it."""
    model = nobs.instrument(nn.ModuleDict({"generator": nn.Linear(4, 4), "discriminator": nn.Linear(4, 1)}))
    halves = list(model.values())
    optimizers = [torch.optim.SGD(half.parameters(), lr=0.1, fused=fused) for half in halves]
    with nobs.Recorder(model, optimizer=optimizers, directory=tmp_path, triggers=[]) as recorder:
        for step in range(4):
            found = [0.0, 0.0]
            order = (1, 0) if step % 2 else (0, 1)
            for half in order:
                if zeroed == "before its backward":
                    optimizers[half].zero_grad()
                scale = 100.0 if half == order[0] else 1.0
                (model["discriminator"](model["generator"](torch.ones(2, 4))).mean() * scale).backward()
                found[half] = halves[half].weight.grad.norm().item()
                optimizers[half].step()
                if zeroed == "behind its step":
                    for optimizer in optimizers:
                        optimizer.zero_grad()
            recorder.step(1.0)
            if zeroed == "before its backward":
                model.zero_grad()
            row = recorder.history()
            read = [row[name, "weight.grad", "norm"][-1] for name in ("generator", "discriminator")]
            assert read == pytest.approx(found, rel=1e-5), step


def test_clipping_between_micro_batches():
    """Each micro-batch clipped as it accumulates: the reading is of what the optimizer finds in the end."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    ring = nobs.RingBuffer(model)
    for scale in (100.0, 1.0):
        (model(torch.ones(2, 3)).sum() * scale).backward()
        found = model.weight.grad.norm().item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    ring.add(0, 0.0)
    assert ring.history()["(model)", "weight.grad", "norm"][0] == pytest.approx(found, rel=1e-6)


def test_gradients_that_nobody_uses():
    """Without any optimizer, a step that only looks, the last backward's gradient is there all the same."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    ring = nobs.RingBuffer(model)
    for step in range(2):
        model(torch.ones(2, 3)).sum().backward()
        ring.add(step, 0.0)
    norms = ring.history()["(model)", "weight.grad", "norm"]
    assert norms == pytest.approx([2 * 3**0.5, 4 * 3**0.5])


@pytest.mark.parametrize("fused", [False, True])
def test_two_updates_of_which_the_first_was_worse(fused, tmp_path):
    """Both used their gradient: the step shows the worse, with optimizers that count their writes and with those that do not."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, triggers=[]) as recorder:
        for scale in (100.0, 1.0):
            optimizer.zero_grad()
            (model(torch.ones(2, 3)).sum() * scale).backward()
            optimizer.step()
        recorder.step(1.0)
        assert recorder.history()["(model)", "weight.grad", "norm"][0] == pytest.approx(200 * 3**0.5, rel=1e-6)
    assert not optimizer._optimizer_step_post_hooks


def test_lbfgs_calls_back():
    """An optimizer that runs the loop itself: several backwards and updates in one step, the worst is shown."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    ring, norms = nobs.RingBuffer(model), []

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 3)) - 1).square().sum()
        loss.backward()
        norms.append(model.weight.grad.norm().item())
        return loss

    optimizer.step(closure)
    ring.add(0, 0.0)
    assert ring.history()["(model)", "weight.grad", "norm"][0] == pytest.approx(max(norms), rel=1e-6)


class Lookahead(torch.optim.Optimizer):
    """A wrapper as many write it: without `super().__init__`."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_update_without_zeroing(wrapped, tmp_path):
    """A loop that forgets zero_grad: the gradient grows from update to update, and the recording shows it."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    outer = Lookahead(optimizer) if wrapped else optimizer
    with nobs.Recorder(model, optimizer=outer, directory=tmp_path, triggers=[]) as recorder:
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            outer.step()
        recorder.step(1.0)
        assert recorder.history()["(model)", "weight.grad", "norm"][0] == pytest.approx(4 * 3**0.5, rel=1e-6)


def test_hooks_of_others():
    """A hook that only looks at the gradient is no optimizer: micro-batches accumulate as without it."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    ring = nobs.RingBuffer(model)
    for _ in range(4):
        model(torch.ones(2, 3)).sum().backward()
    ring.add(0, 0.0)
    assert ring.history()["(model)", "weight.grad", "norm"][0] == pytest.approx(8 * 3**0.5, rel=1e-6)


def test_a_hook_that_clips(tmp_path):
    """It writes to the gradient and not to the parameter: two micro-batches are one gradient, from the first step on."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))

    def clip(parameter):
        parameter.grad.clamp_(-1000, 1000)

    model.weight.register_post_accumulate_grad_hook(clip)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, triggers=[]) as recorder:
        for _ in range(3):
            for scale in (100.0, -99.0):
                (model(torch.ones(2, 3)).sum() * scale).backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(1.0)
        assert recorder.history()["(model)", "weight.grad", "norm"] == pytest.approx([2 * 3**0.5] * 3, rel=1e-6)


def test_an_optimizer_behind_the_accumulation():
    """torch.distributed's optimizer in the backward sits where nobody sees it: from the second step on it is known."""
    model = nn.Linear(3, 1, bias=False)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    ring = nobs.RingBuffer(nobs.instrument(model))
    for step in range(3):
        before = model.weight.norm().item()
        model(torch.ones(2, 3)).sum().backward()
        ring.add(step, 0.0)
        row = next(ring.drain())
        if step == 0:  # neither a gradient that is gone nor a weight behind its update
            assert row["(model)", "weight.grad", "norm"] != row["(model)", "weight.grad", "norm"]
            assert row["(model)", "weight", "norm"] != row["(model)", "weight", "norm"]
        else:
            assert row["(model)", "weight.grad", "norm"] == pytest.approx(2 * 3**0.5, rel=1e-6)
            assert row["(model)", "weight", "norm"] == pytest.approx(before, rel=1e-6)


class _Waits(torch.autograd.Function):
    """The identity; its backward stops until all threads have come so far."""

    @staticmethod
    def forward(ctx, x, barrier):
        ctx.barrier = barrier
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.barrier.wait()
        return grad, None


def test_many_backwards_at_once():
    """Twelve threads in the middle of their backwards: none forgets which parameters it had touched before."""
    model = nobs.instrument(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)))
    ring = nobs.RingBuffer(model)
    barrier = threading.Barrier(12)

    def train(thread):
        middle = _Waits.apply(model[0](torch.ones(2, 4)), barrier)
        model[2 if thread == 0 else 1](middle).sum().backward()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(train, range(12)))
    ring.add(0, 0.0)
    row = next(ring.drain())
    for name in "012":
        assert row[name, "weight.grad", "norm"] == pytest.approx(model[int(name)].weight.grad.norm().item(), rel=1e-5)


def test_parameters_that_torch_swaps():
    """With torch's flag for it `.double()` and `load_state_dict` exchange the parameters; they are watched again."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = nobs.instrument(nn.Linear(3, 1))
        ring = nobs.RingBuffer(model)
        model.double()
        model.load_state_dict(nn.Linear(3, 1).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    norms = []
    for step in range(2):
        model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        norms.append(model.weight.grad.norm().item())
        ring.add(step, 0.0)
    assert ring.history()["(model)", "weight.grad", "norm"][1] == pytest.approx(norms[1], rel=1e-6)


def test_a_layer_unfrozen_while_nothing_else_is_watched():
    """Nothing calls back while all that is recorded is frozen: the change is noticed some steps later."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    nobs.instrument(model, layers="0")
    model[0].requires_grad_(False)
    ring = nobs.RingBuffer(model)
    for step in range(20):
        if step == 5:
            model[0].requires_grad_(True)
        model(torch.ones(2, 4)).sum().backward()
        ring.add(step, 0.0)
    norms = ring.history()["0", "weight.grad", "norm"]
    assert not (norms[:5] > 0).any()
    assert (norms[15:] > 0).all()


def test_an_embedding_that_writes_to_its_weight(tmp_path):
    """`max_norm` renormalises the weight in each forward, which is no update: four micro-batches are one gradient."""
    model = nobs.instrument(nn.Embedding(5, 3, max_norm=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, triggers=[]) as recorder:
        for _ in range(2):
            for scale in (1.0, -3.0, 1.0, 1.5):
                (model(torch.tensor([0, 1, 4])).sum() * scale).backward()
            found = model.weight.grad.norm().item()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(1.0)
        # From the second step on: until the optimizer has told of its first, any write to the weight counts as an update.
        assert recorder.history()["(model)", "weight.grad", "norm"][-1] == pytest.approx(found, rel=1e-6)


def test_a_dropped_step_leaves_nothing(tmp_path):
    """Readings that were not settled when the batch was dropped do not come back in the next step."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, triggers=[]) as recorder:
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        recorder.skip()
        recorder.step(1.0)
        norm = recorder.history()["(model)", "weight.grad", "norm"][0]
        assert norm != norm


def test_recorders_leave_no_hooks_behind(tmp_path):
    """Made without a `with` block and dropped, three in a row: the optimizer is as before."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        recorder = nobs.Recorder(nobs.instrument(model), optimizer=optimizer, directory=tmp_path)
        assert len(optimizer._optimizer_step_post_hooks) == 1
        del recorder
        nobs.uninstrument(model)
        assert not optimizer._optimizer_step_post_hooks
