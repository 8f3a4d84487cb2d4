"""Train `tiny_gpt`: `python -m qpipe.models.tiny_gpt.train` (about ten minutes on one core).

The seed fixes everything but the text, which is that of the running Python. The same torch and Python on the same
kind of CPU give the same file; elsewhere the weights differ and the perplexity hardly does.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import nn

from .. import tiny_gpt
from ..weights import load_weights, save_weights
from .corpus import split_topics, training_text, windows
from .network import CONTEXT, TinyGPT
from .tokenizer import VOCABULARY, learn, tokenizer


def next_token_loss(network: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats of windows [n, t + 1]: the first t tokens predict the last t."""
    return nn.functional.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(seed: int = 0, steps: int = 1000, batch: int = 16, rate: float = 3e-3) -> nn.Module:
    """Train from nothing and return the network in evaluation mode.

    Args:
        seed: Fixes initial weights and the order of the data.
        steps: Updates; the learning rate warms up over a twentieth of them and then follows a cosine to a twentieth.
        batch: Windows per step, cut at random from the training text.
        rate: Largest learning rate.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    tokens = torch.tensor(tokenizer().encode(training_text()))
    network = TinyGPT().train()
    print(f"{len(tokens)} training tokens, {sum(p.numel() for p in network.parameters())} parameters", flush=True)
    decayed = [p for p in network.parameters() if p.dim() == 2]
    others = [p for p in network.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))),
    )
    began = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - CONTEXT - 1, (batch, 1))
        loss = next_token_loss(network, tokens[starts + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            held_out = perplexity(network)
            print(
                f"step {step + 1}: {loss:.3f} nats, held-out {held_out:.2f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return network.eval()


def perplexity(network: nn.Module) -> float:
    """Return the held-out perplexity of a network."""
    held_out = torch.from_numpy(windows(split_topics()[1], CONTEXT))
    with torch.inference_mode():
        return math.exp(next_token_loss(network, held_out))


def main() -> None:
    """Train, write the weights and print the held-out perplexity of what was written."""
    parser = argparse.ArgumentParser(description="train tiny_gpt")
    parser.add_argument("-o", "--output", type=Path, default=tiny_gpt.WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn-vocabulary", action="store_true", help="learn vocabulary.json anew and stop")
    arguments = parser.parse_args()
    if arguments.learn_vocabulary:
        VOCABULARY.write_text(json.dumps({"merges": learn(training_text(), 1024)}, separators=(",", ":")) + "\n")
        return
    save_weights(train(arguments.seed), arguments.output)
    network = load_weights(TinyGPT(), arguments.output)
    print(f"held-out perplexity {perplexity(network):.3f}, {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
