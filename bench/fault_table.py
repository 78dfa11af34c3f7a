"""Which fault has which cause, and how each is planted into a running training.

A fault acts before every step of the run, from the step on at which it is planted. What it changes inside a layer goes
through the layer's `Plant`: numbers in a tensor, so that compiled code serves healthy and faulty steps alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fault_plant import ADD, GAIN, GRAD_ADD, GRAD_GAIN, Moment
from torch import Tensor

IMAGES = ("convnet", "resnet", "vit", "lstm", "towers")
ALL = (*IMAGES, "gpt")


def nothing(m: Moment) -> None:
    """Before the fault, and in its twin."""


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Args:
        causes: what the first finding should say; where two are equally right, both.
        act: changes a moment.
        site: the kind of site that should be named: output, gradient, parameter, loss; None where there is no one site.
        among: the layers to plant in: "layers", "residual", "logits", "recurrent" of the task; "first" for the first
            layer that the input meets; "none" where no layer is guilty.
        twisted: changes Python code inside of the layer, which compiled code has no place for.
        dtypes, optimizers: where the fault exists.
        lasts: steps behind the fault.
        before: acts in the steps before it, and in all steps of the twin.
    """

    causes: tuple[str, ...]
    act: Callable[[Moment], None]
    site: str | None
    among: str = "layers"
    models: tuple[str, ...] = ALL
    twisted: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    optimizers: tuple[str, ...] = ("sgd", "adam", "adamw")
    lasts: int = 40
    before: Callable[[Moment], None] = nothing


def knob(place: int, value: float, once: bool = False) -> Callable[[Moment], None]:
    """Turn a knob to a value, for good or for one step."""
    still = 0.0 if place in (ADD, GRAD_ADD) else 1.0
    return lambda m: m.knob(place, value if m.since == 0 or not once else still)


def growing(factor: float, most: float) -> Callable[[Moment], None]:
    return lambda m: m.knob(GAIN, min(factor ** (m.since + 1), most))


def twist(change: Callable[[Tensor], Tensor]) -> Callable[[Moment], None]:
    def act(m: Moment) -> None:
        vars(m.layer)["twist"] = change

    return act


def written(write: Callable[[Tensor], None]) -> Callable[[Moment], None]:
    """Something writes to the weight at the step of the fault."""

    def act(m: Moment) -> None:
        if m.since == 0:
            with torch.no_grad():
                write(m.weight.view(-1))

    return act


def flip(weight: Tensor) -> None:
    """The highest bit of an exponent, of the largest weight."""
    place = int(weight.abs().argmax())
    weight.view(torch.int32)[place] ^= 1 << 30


def image(change: Callable[[Tensor], Tensor], once: bool = False) -> Callable[[Moment], None]:
    def act(m: Moment) -> None:
        if m.since == 0 or not once:
            m.inputs["image"] = change(m.inputs["image"].clone())

    return act


def one_pixel(value: float) -> Callable[[Tensor], Tensor]:
    def change(pixels: Tensor) -> Tensor:
        pixels[0, 0, 7, 7] = value
        return pixels

    return change


def same_words(m: Moment) -> None:
    m.inputs["words"] = torch.full_like(m.inputs["words"], 3)


def labels(change: Callable[[Moment], Tensor]) -> Callable[[Moment], None]:
    def act(m: Moment) -> None:
        m.targets = change(m)

    return act


def rate(change: Callable[[int, float], float]) -> Callable[[Moment], None]:
    """The learning rate of every group, from what it was when the run began."""

    def act(m: Moment) -> None:
        for group in m.optimizer.param_groups:
            group["lr"] = change(m.since, group.setdefault("first_lr", group["lr"]))

    return act


def weighted(scale: float) -> Callable[[Moment], None]:
    def act(m: Moment) -> None:
        m.weight_of_loss = scale

    return act


def quiet(m: Moment) -> None:
    """Gradients of a thousandth for long, which Adam's second moment has forgotten nothing of but: of a run of 10,000 steps."""
    m.weight_of_loss = 1e-3
    for group in m.optimizer.param_groups:
        group["lr"] = 6e-3
    for state in m.optimizer.state.values():
        state["step"].fill_(10_000.0)


def own_loss(change: Callable[[Tensor], Tensor]) -> Callable[[Moment], None]:
    def act(m: Moment) -> None:
        m.loss = change

    return act


FAULTS: dict[str, Fault] = {
    "NaN in a forward, once": Fault(("nonfinite_forward",), knob(ADD, math.nan, once=True), "output"),
    "Inf in a forward": Fault(("nonfinite_forward", "overflow"), knob(ADD, math.inf), "output"),
    "0 / 0 in a forward": Fault(("nonfinite_forward",), twist(lambda y: y / (y - y)), "output", twisted=True),
    "log of zero in a forward": Fault(("nonfinite_forward",), twist(lambda y: y.relu().log()), "output", twisted=True),
    "log of zero in the loss": Fault(("nonfinite_forward",), own_loss(lambda loss: loss - (loss * 0).log()), "loss", "none"),
    "NaN in a backward": Fault(("nonfinite_backward",), knob(GRAD_ADD, math.nan), "gradient"),
    "Inf in a backward, once": Fault(
        ("nonfinite_backward",), knob(GRAD_ADD, math.inf, once=True), "gradient", dtypes=("float32", "bfloat16")
    ),
    "sqrt at zero": Fault(("nonfinite_backward",), twist(lambda y: y + (y * 0).sqrt()), "gradient", twisted=True),
    "one NaN in a weight": Fault(("nonfinite_weight",), written(lambda w: w[3:4].fill_(math.nan)), "parameter"),
    "one Inf in a weight": Fault(("nonfinite_weight",), written(lambda w: w[3:4].fill_(math.inf)), "parameter"),
    "NaN in a batch": Fault(("nonfinite_input",), image(one_pixel(math.nan), once=True), "output", "first", IMAGES),
    "Inf in a batch": Fault(("nonfinite_input",), image(one_pixel(math.inf), once=True), "output", "first", IMAGES),
    "a batch x 1e4": Fault(("bad_batch",), image(lambda x: x * 1e4, once=True), "output", "first", IMAGES),
    "pixels from 0 to 255": Fault(("bad_batch",), image(lambda x: (x * 0.3081 + 0.1307) * 255), "output", "first", IMAGES),
    "normalised twice": Fault(("bad_batch",), image(lambda x: (x - 0.1307) / 0.3081), "output", "first", IMAGES),
    "a constant batch": Fault(("bad_batch",), image(lambda x: torch.full_like(x, -0.4242)), "output", "first", IMAGES),
    "all words the same": Fault(("bad_batch", "loss_spike"), same_words, None, "none", ("gpt", "towers")),
    "labels out of range": Fault(
        ("bad_batch", "loss_spike"), labels(lambda m: m.targets + 100), None, "none", ("convnet", "resnet", "vit", "lstm", "gpt")
    ),
    "labels shuffled": Fault(
        ("loss_spike",), labels(lambda m: m.targets[torch.randperm(len(m.targets), generator=m.generator)]), None, "none",
        ("convnet", "resnet", "vit", "lstm", "gpt"),
    ),
    "labels shifted by one": Fault(
        ("loss_spike",), labels(lambda m: (m.targets + 1) % 10), None, "none", ("convnet", "resnet", "vit", "lstm", "gpt")
    ),
    "learning rate x 30": Fault(("learning_rate",), rate(lambda t, lr: lr * (30 if t >= 0 else 1)), None, "none", lasts=70),
    "learning rate x 1000": Fault(("learning_rate",), rate(lambda t, lr: lr * (1000 if t >= 0 else 1)), None, "none"),
    "a learning rate that climbs": Fault(("learning_rate",), rate(lambda t, lr: lr * 1.12 ** max(t, 0)), None, "none", lasts=110),
    "gradient x 1e6": Fault(("gradient_explosion",), knob(GRAD_GAIN, 1e6), "gradient"),
    "gradient x 1e6, once": Fault(
        ("gradient_explosion",), knob(GRAD_GAIN, 1e6, once=True), "gradient", dtypes=("float32", "bfloat16")
    ),
    "a weight x 1e3": Fault(("weight_corruption",), written(lambda w: w.mul_(1e3)), "parameter"),
    "a bit of a weight flips": Fault(("weight_corruption", "nonfinite_weight"), written(flip), "parameter"),
    "float16 overflow, in steps": Fault(("overflow",), growing(3.0, 1e9), "output", dtypes=("float16",)),
    "float16 overflow, at once": Fault(("overflow",), knob(GAIN, 3e5), "output", dtypes=("float16",)),
    "float16 underflow": Fault(("underflow",), weighted(1e-9), "gradient", "none", dtypes=("unscaled float16",)),
    "attention logits grow": Fault(("gradient_explosion",), growing(1.4, 1e6), "output", "logits", ("vit", "gpt", "towers")),
    "a layer dies": Fault(("dead_layer",), knob(GAIN, 0.0), "output"),
    "a layer is cut off": Fault(("vanishing_gradient",), twist(lambda y: y.detach()), "gradient", twisted=True),
    "a gradient of zero": Fault(("vanishing_gradient",), knob(GRAD_GAIN, 0.0), "gradient"),
    "gradients vanish through depth": Fault(("vanishing_gradient",), nothing, "gradient", "none", ("deep",)),
    "exploding recurrent gradients": Fault(("gradient_explosion",), knob(GRAD_GAIN, 4.0), "gradient", "recurrent", ("lstm",)),
    "Adam after a long quiet phase": Fault(("optimizer_state",), weighted(1.0), None, "none",
        optimizers=("adam", "adamw"), before=quiet),
    "a residual branch x 100": Fault(
        ("gradient_explosion",), knob(GAIN, 100.0), "output", "residual", ("resnet", "vit", "gpt", "towers")
    ),
    "a residual branch grows": Fault(
        ("gradient_explosion",), growing(1.3, 1e6), "output", "residual", ("resnet", "vit", "gpt", "towers")
    ),
}  # fmt: skip
"""The published table. What a layer computes wrong shows as its output leaving its range with clean input and weights; the
closed list of causes has `gradient_explosion` for that: gradients or activations that blow up at a layer."""
