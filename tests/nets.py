"""Small models with what models have: shared layers, in-place activations, recomputation, tuples, a root parameter."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Gained(nn.Linear):
    """A user's own layer: calls super() and owns one more parameter."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.gain


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.down, self.up, self.norm = Gained(2 * d, d), nn.Linear(d, 2 * d), nn.LayerNorm(d)

    def forward(self, x):
        return x + self.down(F.relu(self.up(self.norm(x)), inplace=True))


class Tokens(nn.Module):
    """A GPT without attention. Registered in another order than it runs in."""

    def __init__(self, recompute=False, d=16, depth=3, vocabulary=20):
        super().__init__()
        self.head = nn.Linear(d, vocabulary)
        self.blocks = nn.ModuleList(Block(d) for _ in range(depth))
        self.embed = nn.Embedding(vocabulary, d)
        self.recompute = recompute

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x).flatten(0, 1)

    @staticmethod
    def batch(n=4):
        return torch.randint(0, 20, (n, 8)), torch.randint(0, 20, (n * 8,))


class Images(nn.Module):
    """Convolutions, a norm with running statistics, in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.fc = nn.Conv2d(4, 8, 3, stride=2), nn.Linear(8 * 9, 10)

    def forward(self, x):
        x = self.bn(self.conv1(x)).relu_()
        return self.fc(F.max_pool2d(self.conv2(x).relu_(), 2).flatten(1))

    @staticmethod
    def batch(n=4):
        return torch.randn(n, 1, 14, 14), torch.randint(0, 10, (n,))


class Split(nn.Linear):
    """Returns a tuple with a tensor, a dict and an integer tensor in it."""

    def forward(self, x):
        y = super().forward(x)
        return y, {"twice": 2 * y, "index": y.argmax(-1)}


class Outputs(nn.Module):
    """Every kind of container as a layer's output, one layer called twice, a root parameter, an unused layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.split, self.shared, self.unused = Split(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        y, more = self.split(x)
        x = self.shared(self.shared(y + more["twice"])).sigmoid()
        x, _ = self.attention(x, x, x, need_weights=False)
        return (x.mean(1) * self.scale).clone()

    @staticmethod
    def batch(n=4):
        return torch.randn(n, 5, 6), torch.randint(0, 6, (n,))


def loss_of(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)
