"""The slow reference: plain hooks, float64, a host read for every number, and nothing of nobs.

It hooks a model, instrumented or not, and gives for every (layer, site) what nobs should have recorded. It looks through an
operator that no compiler sees into, so that under torch.compile, too, it reads the very tensors that flow there; behind a
layer with its tap it therefore reads what the tap has read. The gradient of a tensor is that of all that is made of it, inside
of the layer as well.
"""

from collections import Counter, defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.utils._pytree import tree_leaves, tree_map

WATCHED = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Linear, nn.MultiheadAttention, nn.RNNBase)
"""Watched even without parameters of their own; any module that owns parameters is watched besides."""

_seen = {}
"""Key -> the list of readings of one site of one twin; None while that twin sleeps."""


def reference(tensor):
    """The statistics of one tensor, in float64 with NumPy."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    x = tensor.detach().resolve_neg().to(torch.float64).numpy().ravel()
    finite = x[np.isfinite(x)]
    nan, posinf, neginf = np.isnan(x).sum(), np.isposinf(x).sum(), np.isneginf(x).sum()
    return {
        "norm": float(np.sqrt((finite**2).sum())) if finite.size else np.nan,
        "absmax": float(np.abs(finite).max()) if finite.size else 0.0,
        "nan": float(nan),
        "posinf": float(posinf),
        "neginf": float(neginf),
        "zeros": float((x == 0).mean()) if x.size else 0.0,
        "elements": float(x.size),
    }


def worst(several):
    """The fold of a step: everything by maximum, zeros by minimum, NaN where any call had no finite value."""
    names = several[0]
    return {name: (min if name == "zeros" else np.max)([one[name] for one in several]) for name in names}


@torch.library.custom_op("twin::look", mutates_args={"count"})
def look(x: Tensor, key: Tensor, count: Tensor) -> None:
    """Read a tensor. Counts, so that no compiler takes it for idle; the key is a tensor, so that like blocks share code."""
    count += 1
    readings = _seen[int(key)]
    if readings is not None:
        readings.append(reference(x))


@look.register_fake
def _(x, key, count):
    return None


def watch(x, key, count, grad_key, grad_count):
    """Look at a tensor, and later at its gradient."""
    look(x.detach(), key, count)
    for proxy in _get_proxies(grad_count):  # several forwards may run before the backward that counts
        proxy.node.meta["saved_tensor_with_no_vc_check"] = True
    if x.requires_grad and not isinstance(x, FakeTensor):
        x.register_hook(lambda grad: look(grad, grad_key, grad_count))


_get_proxies = getattr(proxy_tensor, "_get_proxies", lambda _: ())
_library = torch.library.Library("twin", "FRAGMENT")
_library.define("watch(Tensor x, Tensor key, Tensor(a!) count, Tensor grad_key, Tensor(b!) grad_count) -> ()")
_library.impl("watch", watch, "CompositeImplicitAutograd")


def is_number(x):
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


class Twin:
    """Watches a model; `update()` just before an optimizer steps, `lines()` gives the running step, `clear()` ends it."""

    def __init__(self, model):
        self.model = model
        self.asleep = False
        self.sites = {}
        self.gradients = defaultdict(list)
        self.values = {}
        for name, module in model.named_modules():
            if isinstance(module, WATCHED) or any(p is not None for p in module._parameters.values()):
                self._watch(module, name or "(model)")

    def _watch(self, module, name):
        tensors = []
        for site in ("output", "output.grad"):
            key = len(_seen)
            _seen[key] = self.sites[name, site] = []
            tensors += [torch.tensor(key), torch.tensor(0)]
        module._twin = tensors

        def watched(tensor, shared=()):
            """Gives a copy, as a later write to a view would take the hook away; but none of several names of one memory."""
            if not is_number(tensor):
                return tensor
            (torch.ops.twin.watch if torch.compiler.is_compiling() else watch)(tensor, *module._twin)
            return tensor if shared and tensor.untyped_storage().data_ptr() in shared else tensor.clone()

        def forward(*args, **kwargs):
            output = type(module).forward(module, *args, **kwargs)
            if torch.compiler.is_compiling():
                return tree_map(watched, output)
            memories = Counter(x.untyped_storage().data_ptr() for x in tree_leaves(output) if is_number(x) and x.numel())
            shared = {memory for memory, times in memories.items() if times > 1}
            return tree_map(lambda x: watched(x, shared), output)

        # Not a hook: some of those run outside of the graph, where a part of the gradient is not seen.
        module.forward = forward

    def sleep(self):
        """Look at nothing any more, where that would take too long."""
        for key, readings in list(_seen.items()):
            if any(readings is own for own in self.sites.values()):
                _seen[key] = None
        self.asleep = True

    def clear(self):
        for readings in (*self.sites.values(), self.gradients):
            readings.clear()
        self.values.clear()

    def update(self, parameters=None, scale=1.0):
        """Read the parameters, and their gradients, that the optimizer is about to use; all of the model's by default."""
        if self.asleep:
            return
        chosen = None if parameters is None else {id(p) for p in parameters}
        for name, parameter in self.model.named_parameters():
            layer, _, own = name.rpartition(".")
            self.values.setdefault((layer or "(model)", own), reference(parameter))
            if parameter.grad is not None and (chosen is None or id(parameter) in chosen):
                self.gradients[layer or "(model)", f"{own}.grad"].append(_unscaled(reference(parameter.grad), scale))

    def lines(self, scale=1.0):
        """(layer, site) -> statistics of the step."""
        lines = {key: worst(readings) for key, readings in (*self.sites.items(), *self.gradients.items()) if readings}
        return self.values | {key: _unscaled(line, scale if key[1] == "output.grad" else 1) for key, line in lines.items()}


def _unscaled(line, scale):
    return line | {name: line[name] / scale for name in ("norm", "absmax")}


def furthest(row, lines):
    """The largest relative error of any statistic, and where; the row has the lines that the twin saw, and no more."""
    recorded = {(tap.layer, tap.site) for i, tap in enumerate(row.table.taps) if np.isfinite(row.values[i, -1])}
    assert not recorded ^ set(lines), sorted(recorded ^ set(lines))
    errors = [(0.0, "")]
    for (layer, site), expected in lines.items():
        for name, value in expected.items():
            got = row[layer, site, name]
            if not (got == value or (np.isnan(got) and np.isnan(value))):
                error = abs(got - value) / max(abs(value), 1e-30) if np.isfinite(got - value) else np.inf
                errors.append((error, f"{layer} {site} {name}: {got} for {value}"))
    return max(errors)


def assert_agree(row, lines, rtol=1e-5):
    """Every statistic of every line that the twin saw is in the row, within a relative error."""
    error, where = furthest(row, lines)
    assert error <= rtol, (error, where)
