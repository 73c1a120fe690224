"""A small byte-level transformer, written plainly: pre-norm blocks, rotary positions, tied output weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """What a model is made of; `context` is the number of bytes it looks back on."""

    dim: int
    layers: int
    heads: int
    context: int


@dataclass(frozen=True)
class Size(Shape):
    """A model with the demo's run that fits it.

    `batch` is in windows per micro-batch; `lr_grid` is what AdamW's learning rate is chosen from; `threads` is for a
    CPU, 0: as many as PyTorch takes.
    """

    batch: int
    steps: int
    lr_grid: tuple[float, ...]
    threads: int = 0


SIZES = {
    "tiny": Size(dim=96, layers=2, heads=4, context=128, batch=2, steps=250, lr_grid=(2e-3, 4e-3, 8e-3), threads=1),
    "small": Size(dim=384, layers=6, heads=6, context=256, batch=16, steps=1000, lr_grid=(5e-4, 1e-3, 2e-3)),
    "100m": Size(dim=768, layers=14, heads=12, context=512, batch=32, steps=2000, lr_grid=(3e-4, 6e-4, 1.2e-3)),
}
"""0.25, 10.7 and 99.3 million parameters."""


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of channels of (batch, heads, time, channels) by an angle that grows with the position."""
    half = x.shape[-1] // 2
    speeds = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to the (batch, time, dim) stream."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)
        self.feed_norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim, bias=False)
        self.narrow = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, dim) to the same shape; no position sees a later one."""
        batch, time, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, dim))
        y: Tensor = x + self.narrow(F.relu(self.widen(self.feed_norm(x))))
        return y


class ByteTransformer(nn.Module):
    """Predicts the next byte from up to `context` earlier ones."""

    def __init__(self, size: Shape) -> None:
        super().__init__()
        self.context = size.context
        self.tokens = nn.Embedding(VOCABULARY, size.dim)
        self.blocks = nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.dim)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Layers keep the scale of their input; what is added to the stream shrinks with its depth.
                added = 2 * size.layers if name.endswith(("project.weight", "narrow.weight")) else 1
                nn.init.normal_(parameter, std=(parameter.shape[1] * added) ** -0.5)

    def forward(self, windows: Tensor) -> Tensor:
        """Return the mean loss in nats per byte (a scalar) of int64 windows (batch, time + 1)."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.tokens(inputs)
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
