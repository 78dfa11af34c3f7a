"""Small models with what trips a recorder: each has one peculiarity, which its name says."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree


def rows(*shape):
    return lambda n: (torch.randn(n, *shape),)


class Recurrent(nn.Module):
    """Dynamo compiles what is before the recurrent layer; of a frame that came to one in a loop it would compile nothing."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.head = nn.Linear(8, 8), inner, nn.Linear(8, 2)

    def forward(self, x):
        x = self.before(x).tanh()
        x, _ = self.inner(x)
        return self.head(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x, x, x)[0])


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.inner(x, x[:, :3])


class Tied(nn.Module):
    """The head reads the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.middle(self.embed(x)).tanh())


class CalledManyTimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        for _ in range(5):
            x = self.cell(x).tanh()
        return self.head(x)


class Remembering(nn.Linear):
    """Calls super() and keeps state on itself."""

    def forward(self, x):
        self.last = super().forward(x)
        self.calls = getattr(self, "calls", 0) + 1 if not torch.compiler.is_compiling() else 0
        return self.last * 2


class Lora(nn.Module):
    """Wraps a frozen layer and adds a product of two small ones, the second of which begins at zero."""

    def __init__(self, inner, rank=2):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down, self.up = nn.Linear(inner.in_features, rank, bias=False), nn.Linear(rank, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def pruned():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class RootParameter(nn.Module):
    """As in a ViT: a token and positions that belong to the model itself."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 6, 8) * 0.02)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.block(x)[:, 0]


class Listed(nn.Module):
    """Parameters in a list and in a dictionary."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(8), torch.full((8,), 0.5)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(8)})

    def forward(self, x):
        for scale in self.scales:
            x = x * scale
        return x + self.shifts["a"]


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    parts: tuple
    name: str = "answer"


_pytree.register_dataclass(Answer)  # so that the twin finds the tensors in it


class Several(nn.Linear):
    """Its output is a dataclass with tuples and dictionaries, and with an integer tensor in it."""

    def forward(self, x):
        y = super().forward(x)
        return Answer(y, (y * 2, {"thrice": y * 3, "index": y.argmax(-1), "nothing": None}))


class Dataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.several, self.head = Several(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        answer = self.several(x)
        return self.head(answer.logits + answer.parts[0] + answer.parts[1]["thrice"])


class Bits(nn.Module):
    """A layer with a parameter whose output is an integer tensor."""

    def __init__(self):
        super().__init__()
        self.code = Quantized(8)
        self.embed, self.head = nn.Embedding(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.embed(self.code(x)))


class Quantized(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return (x > self.threshold).long()


class Fourier(nn.Module):
    """Complex weights, outputs and gradients."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(5, 5, dtype=torch.complex64), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.fft.irfft(self.mix(torch.fft.rfft(x)), n=8))


class Experts(nn.Module):
    """Rows are sent to one of three layers; the last gets none."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x):
        middle = len(x) // 2
        parts = [self.experts[0](x[:middle]), self.experts[1](x[middle:]), self.experts[2](x[:0])]
        return self.head(torch.cat(parts))


class Looked(nn.Module):
    """Rows of an embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.embed(x))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = F.relu(self.a(x), inplace=True)
        x = self.b(x).mul_(2).add_(1)
        return self.norm(x).sigmoid_()


ODD = {
    "transformer": (EncoderDecoder, rows(5, 8)),
    "attention": (Attention, rows(5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM(8, 8, 2, batch_first=True)), rows(5, 8), False),
    "gru": (lambda: Recurrent(nn.GRU(8, 8, batch_first=True)), rows(5, 8), False),
    "tied": (Tied, lambda n: (torch.randint(0, 12, (n, 6)),)),
    "many calls": (CalledManyTimes, rows(8)),
    "remembering": (lambda: nn.Sequential(Remembering(8, 8), nn.Tanh(), Remembering(8, 2)), rows(8)),
    "lora": (lambda: nn.Sequential(Lora(nn.Linear(8, 8)), nn.Tanh(), Lora(nn.Linear(8, 2))), rows(8)),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2)), rows(8)),
    "old weight_norm": (lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2)), rows(8)),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 2)), rows(8)),
    "pruned": (pruned, rows(8)),
    "root parameter": (RootParameter, rows(5, 8)),
    "parameter list": (Listed, rows(8)),
    "sparse": (Looked, lambda n: (torch.randint(0, 20, (n, 3)),)),
    "dataclass": (Dataclass, rows(8)),
    "integers": (Bits, rows(8)),
    "complex": (Fourier, rows(8)),
    "float64": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double(),
        lambda n: (torch.randn(n, 8).double(),),
    ),
    "empty": (Experts, rows(8)),
    "in place": (InPlace, rows(8)),
    "bfloat16": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)).bfloat16(),
        lambda n: (torch.randn(n, 8).bfloat16(),),
    ),
}
"""Name -> how to make the model, its inputs for a batch size, and whether it compiles as one graph."""
