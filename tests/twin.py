"""The slow reference: plain hooks, float64, a host read for every number, and nothing of nobs.

It watches a model that nobs never touched, in eager, and gives for every (layer, site) what nobs should have recorded.
"""

from collections import defaultdict

import numpy as np
import torch
from torch.utils._pytree import tree_map


def reference(tensor):
    """The statistics of one tensor, in float64 with NumPy."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    x = tensor.detach().to(torch.float64).numpy().ravel()
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


class Twin:
    """Watches an untouched model; `lines()` gives the current step, `clear()` begins the next."""

    def __init__(self, model):
        self.model = model
        self.seen = defaultdict(list)
        for name, module in model.named_modules():
            if any(p is not None for p in module._parameters.values()):
                module.register_forward_hook(self._hook(name or "(model)"))

    def _hook(self, name):
        def watch(tensor):
            if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor
            self.seen[name, "output"].append(reference(tensor))
            # What the layer gives away, and not a tensor that it also used inside; and not what a later relu_ writes to.
            given = tensor.clone()
            if given.requires_grad:
                given.register_hook(lambda grad: self.seen[name, "output.grad"].append(reference(grad)))
            return given.clone()

        return lambda module, args, output: tree_map(watch, output)

    def clear(self):
        self.seen.clear()

    def lines(self, values):
        """(layer, site) -> statistics. `values` are the parameters as the optimizer was about to find them."""
        lines = {key: worst(several) for key, several in self.seen.items()}
        for name, parameter in self.model.named_parameters():
            layer, _, own = name.rpartition(".")
            lines[layer or "(model)", own] = reference(values[name])
            if parameter.grad is not None:
                lines[layer or "(model)", f"{own}.grad"] = reference(parameter.grad)
        return lines


def assert_agree(row, lines, rtol=1e-5, atol=1e-30):
    """Every statistic of every line that the twin saw is in the row, and the row has no more than that."""
    recorded = {(tap.layer, tap.site) for i, tap in enumerate(row.table.taps) if np.isfinite(row.values[i, -1])}
    assert not recorded ^ set(lines), sorted(recorded ^ set(lines))
    for (layer, site), expected in lines.items():
        for name, value in expected.items():
            got = row[layer, site, name]
            np.testing.assert_allclose(got, value, rtol=rtol, atol=atol, err_msg=f"{layer} {site} {name}")
