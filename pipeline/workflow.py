"""Whole jobs from file to file, as the command line, the demo and Python users call them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..calibrate.errors import DataError, ModelError
from .calibration import Calibration, identify
from .calibration.job import machine_memory
from .graph import Model, begin_hash, clone, load, save
from .qdq_check import check_qdq
from .recipe import Recipe, make_recipe
from .stages.collect import CollectOptions, collect
from .stages.cross_layer import CROSS_LAYER, balance
from .stages.decide import wanted_tensors
from .stages.details import hidden_tensors, require_memory, wanted_details
from .stages.inline import inline_functions
from .stages.needed import needed_tensors
from .stages.prepare import prepare, require_opset
from .stages.quantize import (
    Quantized,
    QuantizeOptions,
    needed_detail,
    profits_from_statistics,
    quantize_model,
    runs_in_order,
    runs_layers,
)
from .stages.sequential import Data
from .stages.upgrade import upgrade

_LOG = logging.getLogger(__name__)

Batch = Mapping[str, npt.NDArray[Any]]


@dataclass(slots=True, kw_only=True)
class Job:
    """A float model on its way to a quantized one.

    Attributes:
        model: Prepared; changed by `quantize`.
        path: The file it came from.
        hashing: Waits for `hash`, which threads compute from the time on when the file was loaded.
        rewritten: Whether the graph has tensors that the file lacks or holds other values for, so that it is what runs.
    """

    model: Model
    path: Path
    hashing: Callable[[], str]
    rewritten: bool = False

    @property
    def hash(self) -> str:
        """The hash of the file's content, see `model_hash`."""
        return self.hashing()

    @classmethod
    def open(cls, path: Path, *, convert: bool = False, inline: bool = False, allow_hardlinks: bool = False) -> Job:
        """Load and prepare a model.

        Args:
            path: The float model.
            convert: Upgrade a model whose opset is below 13.
            inline: Replace calls of model-local functions by their bodies, which are then quantized too.
            allow_hardlinks: Accept data files that have other names elsewhere.

        Raises:
            ModelError: Broken, unsafe, or without QuantizeLinear in its opset.
            UsageError: No such file.
        """
        model = load(path, allow_hardlinks=allow_hardlinks)
        hashing = begin_hash(model)
        original = model
        model = upgrade(model) if convert else model
        require_opset(model)
        model = inline_functions(model) if inline else model
        return cls(model=prepare(model), path=path, hashing=hashing, rewritten=model is not original)

    def balance(self, recipe: Recipe, calibration: Calibration | None) -> list[tuple[str, ...]]:
        """Equalize the weights of chains of layers if the recipe says ``cross_layer``, before statistics are collected.

        Args:
            recipe: What the user asks.
            calibration: Statistics that were collected before.

        Returns:
            Names of the layers of each chain that was changed.

        Raises:
            DataError: There are statistics already, and they describe tensors that have changed.
        """
        chains = balance(self.model.graph) if recipe.equalize == CROSS_LAYER else []
        if chains and calibration is not None:
            raise DataError(
                "cross_layer changes what the tensors inside chains of layers hold, and the statistics are of before",
                found=f"{len(chains)} chains, the first from {chains[0][0]!r} to {chains[0][-1]!r}",
                expected="data, to collect statistics of the equalized model",
                do="qpipe quantize model.onnx --equalize cross_layer --data data.npz -o quantized.onnx",
            )
        self.rewritten = self.rewritten or bool(chains)
        return chains

    def collect(
        self,
        batches: Iterable[Batch],
        options: CollectOptions = CollectOptions(),  # noqa: B008
        *,
        detail: str = "channels",
        tensors: Sequence[str] | None = None,
    ) -> Calibration:
        """Run the float file over the data; see `stages.collect`, and `stages.details` for ``detail``.

        ``tensors`` are those that `needed` gives for the recipe that the statistics are for.

        The file itself is run, not the prepared graph: names that survive preparing mean the same values, and a model
        larger than memory stays on disk. Only where tensors are new or changed, after `balance`, inlining or an upgrade
        of the opset, the graph itself is run.
        """
        identity = options.identity or identify(self.path)
        details = options.details or wanted_details(self.model.graph, detail)
        require_memory(self.model.graph, details, machine_memory())
        options = replace(options, identity=identity, details=details)
        source = clone(self.model) if self.rewritten else self.path
        chosen = {*(self.needed() if tensors is None else tensors), *details}
        tensors = [name for name in self.wanted() if name in chosen]
        return collect(source, [*tensors, *hidden_tensors(self.model.functions)], batches, options)

    def needed(self, recipe: Recipe | None = None) -> list[str]:
        """Return the tensors to collect for a recipe, or for the default scheme on every target."""
        return needed_tensors(self.model.graph, recipe, self.model.functions)

    def wanted(self) -> list[str]:
        """Return the tensors to collect for any recipe."""
        return wanted_tensors(self.model.graph)

    def quantize(
        self,
        recipe: Recipe,
        calibration: Calibration | None,
        options: QuantizeOptions = QuantizeOptions(),  # noqa: B008
    ) -> Quantized:
        """Quantize, hold the result against the Q/DQ rules, and note what it came from.

        Raises:
            ModelError: The result breaks a rule (a bug of qpipe); nothing should then be written.
        """
        result = quantize_model(self.model, recipe, calibration, options=options)
        errors = [f for f in check_qdq(result.model, target=recipe.target) if f.severity == "error"]
        if errors:
            raise ModelError(
                "the quantized model does not pass its own check; nothing was written",
                where=errors[0].node or errors[0].tensor,
                found=errors[0].found,
                expected=errors[0].expected,
                do="please report this with the output of qpipe inspect --json",
            )
        result.model.metadata["qpipe.source_hash"] = self.hash  # asked for last: it may have to be waited for
        return replace(result, plan=replace(result.plan, model_hash=self.hash))


def quantize_file(
    source: str | Path,
    target: str | Path,
    recipe: Recipe | None = None,
    data: Iterable[Batch] | Calibration | None = None,
    *,
    force: bool = False,
) -> Quantized:
    """Quantize a model file.

    Args:
        source: Float model.
        target: File to write.
        recipe: What to do; None for the defaults.
        data: Batches (array by input name), or statistics collected before; None when the recipe needs none.
        force: Replace an existing target.

    Returns:
        The quantized model, its plan and its numbers.
    """
    recipe = recipe or make_recipe()
    job = Job.open(Path(source))
    calibration = data if isinstance(data, Calibration) else None
    job.balance(recipe, calibration)
    options = QuantizeOptions()
    if data is not None and not isinstance(data, Calibration):
        recipe = recipe.settled(knows_inputs=True)
        in_order = runs_in_order(recipe)
        batches = list(data) if runs_layers(recipe) else data
        options = QuantizeOptions(data=Data(batches=batches) if runs_layers(recipe) else None)
        if profits_from_statistics(recipe, in_order=in_order):
            detail = needed_detail(recipe, in_order=in_order)
            calibration = job.collect(batches, detail=detail, tensors=job.needed(recipe))
    result = job.quantize(recipe, calibration, options)
    if not result.plan.coded() and recipe.float_type is None:
        nodes = list(result.plan.nodes().values())
        reason = nodes[0].reason if nodes else "the graph has no nodes"
        _LOG.warning("nothing was quantized; of %d nodes the first: %s", len(nodes), reason)
    save(result.model, target, force=force)
    return result
