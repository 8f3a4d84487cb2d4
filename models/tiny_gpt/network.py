"""A decoder-only transformer in the usual arrangement: LayerNorm before attention and before a Gelu MLP.

Shapes: n = batch, t = tokens, d = width, h = heads, v = vocabulary.
Source: Vaswani et al., arXiv:1706.03762; Radford et al. 2019 (pre-LayerNorm, tied embedding).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..outliers import PlantSite

CONTEXT = 128


class Attention(nn.Module):
    """Causal self-attention, [n, t, d] -> [n, t, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """Attend to the past.

        Args:
            x: Input [n, t, d].
            future: True where a query (row) must not see a key (column), [t, t].
        """
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(future, torch.finfo(scores.dtype).min).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each on a LayerNorm and each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.projection = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """Return the block's output [n, t, d]; arguments as for `Attention`."""
        x = x + self.attention(self.ln_1(x), future)
        return x + self.projection(nn.functional.gelu(self.fc(self.ln_2(x))))


class TinyGPT(nn.Module):
    """Token ids to logits of the next token: [n, t] -> [n, t, v].

    Args:
        vocabulary: Number of tokens v.
        width: d.
        layers: Number of blocks.
        heads: h.
    """

    def __init__(self, vocabulary: int = 1024, width: int = 128, layers: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "projection.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits [n, t, v] of token ids [n, t], t <= 128."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        future = places[:, None] < places[None, :]
        x = self.token(input_ids) + self.position(places)
        for block in self.blocks:
            x = block(x, future)
        return nn.functional.linear(self.ln_f(x), self.token.weight)

    def outlier_sites(self) -> list[PlantSite]:
        """Return the LayerNorms before attention and MLP; `ln_f` feeds the tied embedding and is left alone."""
        pairs = [pair for b in self.blocks for pair in ((b.ln_1, b.attention.qkv), (b.ln_2, b.fc))]
        return [PlantSite(norm=norm, readers=(reader,)) for norm, reader in pairs]
