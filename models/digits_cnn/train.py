"""Train `digits_cnn`: `python -m qpipe.models.digits_cnn.train` (about a minute on one core).

The seed fixes everything: the same torch on the same kind of CPU gives the same file. Another CPU sums in another
order, which gives other weights of the same accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import digits_cnn
from ..weights import load_weights, save_weights
from .data import split
from .network import DigitsCNN


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return every image [n, 1, 8, 8] moved by -1, 0 or 1 pixel along each axis, zeros coming in."""
    n, size = len(images), images.shape[-1]
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    dy, dx = torch.randint(0, 3, (2, n, 1, 1), generator=generator)
    rows = torch.arange(size).view(1, size, 1) + dy
    columns = torch.arange(size).view(1, 1, size) + dx
    return padded[torch.arange(n).view(n, 1, 1), 0, rows, columns].unsqueeze(1)


def train(seed: int = 0, epochs: int = 60, batch: int = 64) -> nn.Module:
    """Train from nothing and return the network in evaluation mode.

    Args:
        seed: Fixes initial weights, order of the data, shifts and dropout.
        epochs: Passes over the training part.
        batch: Images per step.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    data = split()
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    network = DigitsCNN().train()
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            logits = network(shifted(images[chosen], generator))
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def accuracy(network: nn.Module) -> float:
    """Return the held-out accuracy of a network, in 0..1."""
    with torch.inference_mode():
        outputs = [{"logits": network(torch.from_numpy(b["image"])).numpy()} for b in digits_cnn.evaluation_batches()]
    return digits_cnn.score(outputs)["accuracy"]


def main() -> None:
    """Train, write the weights and print the held-out accuracy of what was written."""
    parser = argparse.ArgumentParser(description="train digits_cnn")
    parser.add_argument("-o", "--output", type=Path, default=digits_cnn.WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save_weights(train(arguments.seed), arguments.output)
    network = load_weights(DigitsCNN(), arguments.output)
    size = sum(np.prod(p.shape) for p in network.parameters())
    print(f"{size} parameters, held-out accuracy {accuracy(network):.4f}, {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
