"""Weight methods side by side: output error on held-out inputs, for synthetic layers.

    python tests/bench/weights.py [--specs int4:32 int2:32] [--methods rtn gptq] [--shape 256x256] [--tokens N] [--json]

A spec is ``format[:block][:asym]``, without a block one scale per output channel. A method is a registered name, with
an option if wanted (``gptq:0.05``), or an equalizer and a method: ``awq+awq_clip``. Weights are drawn from a Gaussian,
a Laplace and a heavy-tailed distribution (Student, 3 degrees of freedom); inputs are independent, correlated (a few
directions that all channels share), or correlated with some channels 20 times as large as the rest.

``rtn`` is given as output error relative to the output's energy; the others as their error over that of rtn, smaller is
better. The last column is time over that of rtn, in the same run.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from qpipe.calibrate.equalize import EQUALIZERS
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import per_block, per_channel
from qpipe.calibrate.qarray import Spec, dequantize
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WEIGHT_METHODS, WeightStats, output_mse

SPECS = ("int8", "int4:32", "uint4:32:asym", "int4", "int2:32", "nvfp4:16")
METHODS = ("rtn", "rtn_mse", "hqq", "awq_clip", "awq+awq_clip", "gptq", "awq+gptq", "quantease")
WEIGHTS = ("gauss", "laplace", "student")
INPUTS = ("independent", "correlated", "outliers")

Array = np.ndarray


def parse_spec(text: str) -> Spec:
    """Read ``format[:block][:asym]``."""
    name, *rest = text.split(":")
    block = next((int(part) for part in rest if part.isdigit()), 0)
    granularity = per_block(1, block) if block else per_channel(0)
    return Spec(format=FORMATS.get(name), granularity=granularity, symmetric="asym" not in rest)


def draw_weights(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return w [out, in]."""
    draw = {"gauss": rng.standard_normal, "laplace": lambda s: rng.laplace(size=s)}
    values = draw[kind](shape) if kind in draw else rng.standard_t(3, shape)
    return (0.05 * values).astype(np.float32)


def draw_inputs(kind: str, tokens: int, channels: int, rng: np.random.Generator) -> Array:
    """Return x [2 tokens, in]: the first half to calibrate on, the second to measure on."""
    x = rng.standard_normal((2 * tokens, channels))
    if kind != "independent":
        directions = max(1, channels // 4)
        strength = 0.97 ** np.arange(directions)
        x = (rng.standard_normal((2 * tokens, directions)) * strength) @ rng.standard_normal((directions, channels))
        x += 0.3 * rng.standard_normal(x.shape)
    if kind == "outliers":
        x[:, rng.permutation(channels)[: max(1, channels // 50)]] *= 20
    return x.astype(np.float32)


def apply(method: str, w: Array, spec: Spec, stats: WeightStats) -> Array:
    """Return what stands in the place of w [out, in]."""
    *equalizer, algorithm = method.split("+")
    scale = EQUALIZERS.resolve(equalizer[0])(w, spec, stats, None) if equalizer else np.ones(w.shape[1], np.float32)
    return dequantize(WEIGHT_METHODS.resolve(algorithm)(w * scale, spec, stats.scaled(scale))) / scale


def measure(spec: Spec, methods: list[str], shape: tuple[int, int], tokens: int) -> list[dict]:
    """Return one cell per layer and method."""
    rng = np.random.default_rng(0)
    cells = []
    for inputs in INPUTS:
        x = draw_inputs(inputs, tokens, shape[1], rng)
        stats = WeightStats(gram=Gram.of(x[:tokens]), channels=ChannelAmax.of(x[:tokens]))
        held_out = Gram.of(x[tokens:])
        for weights in WEIGHTS:
            w = draw_weights(weights, shape, rng)
            energy = output_mse(w, 0 * w, held_out)
            for method in methods:
                start = time.process_time()
                w_q = apply(method, w, spec, stats)
                seconds = time.process_time() - start
                error = output_mse(w, w_q, held_out) / energy
                cells.append(
                    {"inputs": inputs, "weights": weights, "method": method, "error": error, "seconds": seconds}
                )
    return cells


def report(spec: str, methods: list[str], cells: list[dict]) -> None:
    """Print the table of one spec."""
    layers = [(inputs, weights) for inputs in INPUTS for weights in WEIGHTS]
    error = {(c["method"], c["inputs"], c["weights"]): c["error"] for c in cells}
    seconds = {m: sum(c["seconds"] for c in cells if c["method"] == m) for m in methods}
    print(f"\n{spec:<16}" + "".join(f"{inputs:^30}" for inputs in INPUTS))
    print(f"{'':<16}" + "".join(f"{weights:>10}" for _, weights in layers) + f"{'time':>8}")
    for method in methods:
        row = [error[method, *layer] for layer in layers]
        base = [error["rtn", *layer] for layer in layers]
        shown = [f"{e:10.2e}" if method == "rtn" else f"{e / b:10.3f}" for e, b in zip(row, base, strict=True)]
        print(f"{method:<16}" + "".join(shown) + f"{seconds[method] / max(seconds['rtn'], 1e-9):8.0f}")


def main() -> None:
    """Measure every spec and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--shape", default="256x256", metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    out, channels = (int(part) for part in arguments.shape.split("x"))
    methods = list(dict.fromkeys(["rtn", *arguments.methods]))
    results = {}
    for text in arguments.specs:
        results[text] = measure(parse_spec(text), methods, (out, channels), arguments.tokens)
        if not arguments.json:
            report(text, methods, results[text])
    if arguments.json:
        print(json.dumps({"shape": [out, channels], "tokens": arguments.tokens, "specs": results}))


if __name__ == "__main__":
    main()
