"""What the user asks: a recipe (YAML or flags), checked, with named schemes as its starting points.

A scheme is a few lines of the same recipe language; everything a flag can do, a key can do under the same name.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..calibrate.errors import RecipeError
from ..calibrate.formats import FORMATS
from ..calibrate.granularity import PER_TENSOR, per_block, per_channel
from ..calibrate.qarray import Spec
from .schemes import SCHEMES, near_schemes

AUTO = "auto"
"""Leaves a choice to what is known of model, target and data."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _require_lowering(name: str, part: str, lowerings: tuple[str, ...]) -> str:
    """Return the name of a format that weights or activations can be stored in.

    Raises:
        RecipeError: No format has this name, or it is only cast to, a type of scales, or only for weights.
    """
    fmt = FORMATS.get(name)
    blocked = part == "activations" and fmt.block_size > 0
    if fmt.lowering in lowerings and not blocked:
        return name
    fitting = [
        n for n, f in FORMATS.items() if f.lowering in lowerings and not (part == "activations" and f.block_size)
    ]
    do = f"use --float-type {name} to convert what stays in float" if name in ("float16", "bfloat16", "float32") else ""
    raise RecipeError(
        f"{part} have no codes of the format {name}",
        where=f"{part}.format",
        found=f"{name}: {_UNFIT['block' if blocked else fmt.lowering]}",
        expected=", ".join(sorted(fitting)),
        do=do or f"qpipe explain format {name}",
    )


_UNFIT = {
    "block": "its scales belong to blocks of stored weights",
    "cast": "a type that floats are cast to, without scales",
    "scale": "a type of scales",
    "bnb4": "codes of stored weights",
}


ALGORITHMS = {True: "gptq", False: "rtn_mse"}
"""What the weight algorithm ``auto`` stands for, by whether the inputs of layers are known."""


class WeightOptions(_Part):
    """How weights are stored. ``weights: int4`` is short for ``weights: {format: int4}``.

    Attributes:
        format: Number format, e.g. ``int8``.
        granularity: One scale per tensor, per output channel, per block of input channels, or for the whole model.
        block_size: Values per block when the granularity is ``block``.
        symmetric: Zero point at the middle of the codes; None means symmetric, except for blocks of 4 bits and less
            where the target has zero points.
        narrow_range: Leave out the lowest code of a symmetric signed format, so that codes are symmetric too; None does
            so from 5 bits on, below which every code counts.
        reduce_bits: Bits given up for kernels that saturate; None lets the target limit pairs of codes instead.
        algorithm: Weight algorithm that picks the codes, ``rtn`` when None; ``auto`` takes ``gptq`` where the inputs of
            layers are known (--data, or statistics with --detail gram), ``rtn_mse`` elsewhere.
        sequential: With --data, algorithms that look at inputs quantize layer by layer, each behind the quantized ones
            before it and making up for their errors; otherwise all look at the float model.
        embeddings: Store the tables of Gather too, with one scale per row.
        accuracy_level: What MatMulNBits rounds activations to: 1 leaves them float32, 4 takes int8; None lets the
            target choose.
        float_zero_points: Zero points of packed blocks of 4 bits (MatMulNBits) stay real numbers: less error, a larger
            file, and on CPUs a kernel that is many times slower with few rows. Elsewhere they are codes as ever.
    """

    format: str = "int8"
    granularity: Literal["tensor", "channel", "block", "model"] = "channel"
    block_size: int = Field(default=32, ge=1)
    symmetric: bool | None = None
    narrow_range: bool | None = None
    reduce_bits: int | None = Field(default=None, ge=0, le=7)
    algorithm: str | None = None
    sequential: bool = True
    embeddings: bool = False
    accuracy_level: Literal[0, 1, 2, 3, 4] | None = None
    float_zero_points: bool = False

    @property
    def method(self) -> str:
        """Weight algorithm that picks the codes; one scale for the whole model leaves nothing to pick."""
        algorithm = ALGORITHMS[False] if self.algorithm == AUTO else self.algorithm
        return algorithm or ("fixed" if self.granularity == "model" else "rtn")

    @model_validator(mode="after")
    def _has_zero_points(self) -> WeightOptions:
        if self.float_zero_points and self.symmetric:
            raise ValueError("float_zero_points: symmetric codes have none, leave symmetric out")
        return self

    @field_validator("format")
    @classmethod
    def _is_stored(cls, name: str) -> str:
        return _require_lowering(name, "weights", ("qdq", "bnb4"))

    def spec(
        self, axis: int | None, block_axis: int | None, pair_limit: int = 0, *, has_zero_points: bool = True
    ) -> Spec:
        """Return the `Spec` of a weight.

        Args:
            axis: Axis of the output channels, None where the operator allows one scale only.
            block_axis: Axis of the input channels, which blocks run along; None where blocks cannot be had.
            pair_limit: What the target's kernels ask of int8 weights, unless the recipe gives up bits instead.
            has_zero_points: Whether the target has zero points other than 0.
        """
        fmt, granularity = FORMATS.get(self.format), PER_TENSOR
        if (self.granularity == "block" or fmt.block_size or fmt.codebook) and block_axis is not None:
            granularity = per_block(block_axis, fmt.block_size or self.block_size)
        elif self.granularity in ("channel", "block") and axis is not None:
            granularity = per_channel(axis)
        symmetric = self.symmetric
        if symmetric is None:
            symmetric = not (has_zero_points and fmt.is_integer and fmt.bits <= 4 and granularity.block_size)
        narrow = fmt.bits > 4 if self.narrow_range is None else self.narrow_range
        return Spec(
            format=fmt,
            granularity=granularity,
            symmetric=symmetric,
            narrow_range=narrow and symmetric and fmt.is_integer and fmt.is_signed,
            reduce_bits=(self.reduce_bits or 0) if fmt.is_integer else 0,
            pair_limit=pair_limit if fmt.name == "int8" and self.reduce_bits is None and symmetric else 0,
        )


class ActivationOptions(_Part):
    """How activations are stored. ``activations: int8`` is short for ``activations: {format: int8}``.

    Attributes:
        format: Number format; None lets the target choose between signed and unsigned.
        symmetric: Zero point at the middle of the codes; None lets the target choose.
        narrow_range: Leave out the lowest code.
        reduce_bits: Bits given up, e.g. 1 for codes of 7 bits.
        dynamic: Scales are computed at run time from each tensor.
    """

    format: str | None = None
    symmetric: bool | None = None
    narrow_range: bool = False
    reduce_bits: int = Field(default=0, ge=0, le=7)
    dynamic: bool = False

    @field_validator("format")
    @classmethod
    def _has_quantizer(cls, name: str | None) -> str | None:
        return name and _require_lowering(name, "activations", ("qdq",))

    def spec(self, default_format: str, default_symmetric: bool) -> Spec:
        """Return the per-tensor `Spec` of an activation, with the target's defaults where the recipe says nothing."""
        fmt = FORMATS.get(self.format or default_format)
        return Spec(
            format=fmt,
            granularity=PER_TENSOR,
            symmetric=default_symmetric if self.symmetric is None else self.symmetric,
            narrow_range=self.narrow_range and fmt.is_integer,
            reduce_bits=self.reduce_bits if fmt.is_integer else 0,
        )


class OutlierOptions(_Part):
    """Which input columns stay in floating point, for the form ``outlier``.

    Attributes:
        threshold: A channel is an outlier from this many times the layer's typical magnitude on; the magnitude itself
            when ``absolute``.
        absolute: Take the threshold as a magnitude, as LLM.int8() does with 6.0.
        cap: Most columns per layer; the largest are kept.
        headroom: A value beyond this many times the largest calibrated one of its column counts as a new outlier and is
            computed with two digits; 0 never looks.
        min_inputs: Layers with fewer inputs get static scales, as ``w8a8`` gives, where their statistics show no
            outliers, and stay in float elsewhere: rows cost more to quantize at run time than int8 gains. Float and
            int8 break even at about 128 inputs (``tests/bench/outlier_matmul.py --break-even``).
        counter: Give the model an output ``new_outliers``, int64 [layers]: how many values each layer met in a run that
            calibration did not foresee. The metadata ``qpipe.new_outliers`` name the layers.
    """

    threshold: float = Field(default=20.0, gt=0)
    absolute: bool = False
    cap: int = Field(default=16, ge=0, le=1024)
    headroom: float = Field(default=2.0, ge=0)
    min_inputs: int = Field(default=128, ge=1)
    counter: bool = False

    @property
    def looks_at_data(self) -> bool:
        """Whether outliers are looked for at all: none may be chosen, and none are expected, in vector-wise int8."""
        return self.cap > 0 or self.headroom > 0


class LayerOptions(_Part):
    """Another scheme for some nodes; the first entry that matches a node wins.

    Attributes:
        match: Pattern of node names: a glob, ``re:`` and a regular expression, or ``op:`` and an operator type.
        scheme: Scheme of these nodes; ``float`` leaves them alone.
        weights: Options of weights over those of the scheme; None changes nothing.
        activations: Options of activations over those of the scheme; None changes nothing.
    """

    match: str
    scheme: str
    weights: dict[str, Any] | str | None = None
    activations: dict[str, Any] | str | None = None

    @model_validator(mode="after")
    def _is_sound(self) -> LayerOptions:
        self.recipe()
        return self

    def recipe(self, **keys: Any) -> Recipe:
        """Return the recipe of these nodes, with further ``keys``."""
        own = {name: value for name in ("weights", "activations") if (value := getattr(self, name)) is not None}
        return make_recipe(scheme=self.scheme, **own, **keys)


class Recipe(_Part):
    """Everything that decides how a model is quantized.

    Attributes:
        scheme: Named scheme that the other keys start from.
        target: Deployment target.
        form: How the graph expresses it: ``qdq``, ``dynamic``, ``nbits``, ``bnb4``, ``outlier``; None takes for every
            node what the target runs best.
        method: Calibration method of activations, e.g. ``mse`` or ``percentile:99.99``.
        weights: Options of weights; None leaves weights in float.
        activations: Options of activations; None leaves activations in float.
        outliers: Choice of outlier columns, for the form ``outlier``.
        float_type: Type of what is not quantized, to which it is converted; None keeps what the model has.
        keep_io: Inputs and outputs of the model keep their types when ``float_type`` converts it.
        equalize: Equalization before quantizing, e.g. ``smoothquant:0.5``; ``auto`` takes ``smoothquant`` where static
            8-bit activations are expected to gain by it; ``cross_layer`` balances weights along chains;
            ``none`` leaves the model as it is.
        bias_correction: Fold the expected output error into biases.
        include: Patterns of nodes that may be quantized; empty means all.
        exclude: Patterns of nodes that stay in float.
        keep: ``first`` leaves the layers that no other layer feeds in float, ``last`` those that feed no other.
        layers: Other schemes for some nodes.
    """

    scheme: str = "w8a8"
    target: str = "ort-cpu"
    form: Literal["qdq", "dynamic", "outlier", "nbits", "bnb4"] | None = None
    method: str = "auto"
    weights: WeightOptions | None = WeightOptions()
    activations: ActivationOptions | None = ActivationOptions()
    outliers: OutlierOptions = OutlierOptions()
    float_type: Literal["float32", "float16", "bfloat16"] | None = None
    keep_io: bool = True
    equalize: str | None = AUTO
    bias_correction: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep: tuple[Literal["first", "last"], ...] = ()
    layers: tuple[LayerOptions, ...] = ()

    def settled(self, *, knows_inputs: bool) -> Recipe:
        """Return the recipe with every algorithm ``auto`` written out, by whether the inputs of layers are known."""
        own = {"algorithm": ALGORITHMS[knows_inputs]}

        def layer(entry: LayerOptions) -> LayerOptions:
            weights = entry.recipe().weights
            if weights is None or weights.algorithm != AUTO:
                return entry
            given = {"format": entry.weights} if isinstance(entry.weights, str) else entry.weights or {}
            return entry.model_copy(update={"weights": {**given, **own}})

        update: dict[str, Any] = {"layers": tuple(map(layer, self.layers))}
        if self.weights is not None and self.weights.algorithm == AUTO:
            update["weights"] = self.weights.model_copy(update=own)
        return self.model_copy(update=update)

    @field_validator("equalize")
    @classmethod
    def _none_is_none(cls, name: str | None) -> str | None:
        return None if name == "none" else name

    def digest(self) -> str:
        """Return a hash of the whole recipe, stored with the result."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def make_recipe(**keys: Any) -> Recipe:
    """Build a recipe: the scheme's lines first, then what is given here.

    Raises:
        RecipeError: Unknown scheme or key (with near names), or a value out of range.
    """
    scheme = keys.get("scheme", "w8a8")
    if scheme not in SCHEMES:
        raise RecipeError(
            f"no scheme is called {scheme!r}",
            expected=" or ".join(near_schemes(str(scheme))),
            do=f"use --scheme with one of: {', '.join(sorted(SCHEMES))}",
        )
    merged = _merge(SCHEMES[scheme].keys, keys)
    merged["scheme"] = scheme
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise _recipe_error(error) from error


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file and return its keys, still unchecked.

    Raises:
        RecipeError: The file is missing or is no YAML mapping.
    """
    import yaml

    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError("cannot read the recipe", where=str(path), found=str(error)) from error
    except yaml.YAMLError as error:
        raise RecipeError("the recipe is no YAML", where=str(path), found=str(error)) from error
    if not isinstance(keys, dict):
        raise RecipeError("the recipe is no mapping", where=str(path), found=type(keys).__name__, expected="key: value")
    return keys


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, given in over.items():
        value = given
        if key in ("weights", "activations") and isinstance(given, str):
            value = None if given in ("none", "float") else {"format": given}
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def _recipe_error(error: ValidationError) -> RecipeError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    key = str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] != "extra_forbidden":
        return RecipeError(
            "a recipe key has a wrong value", where=place, found=repr(first["input"]), expected=first["msg"]
        )
    parts = (Recipe, WeightOptions, ActivationOptions, OutlierOptions, LayerOptions)
    known = {name for part in parts for name in part.model_fields}
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return RecipeError(
        f"the recipe has an unknown key {key!r}",
        where=place,
        expected=", ".join(near) if near else ", ".join(sorted(Recipe.model_fields)),
        do="correct or remove the key",
    )
