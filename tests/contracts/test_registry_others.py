"""Every target, form, calibration method and number format keeps the contract of its registry."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnx
import pytest
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.formats import FORMATS, Format
from qpipe.calibrate.qarray import Spec, params_from_range
from qpipe.calibrate.ranges import METHODS
from qpipe.calibrate.registry import Registry
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline.checks.targets import traits_of
from qpipe.pipeline.forms import FORMS
from qpipe.pipeline.rules import RULES
from qpipe.pipeline.targets import TARGETS, Target

REGISTRIES: list[Registry[Any]] = [FORMATS, FORMS, METHODS, RULES, TARGETS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_names_are_found_and_near_ones_suggested(registry: Registry[Any]) -> None:
    names = registry.names()
    assert names == sorted(names)
    assert names
    for name in names:
        assert registry.get(name) is dict(registry.items())[name]
        assert name in registry
    with pytest.raises(RecipeError) as caught:
        registry.get(names[0] + "x")
    assert names[0] in str(caught.value.expected)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_a_name_is_taken_once(registry: Registry[Any]) -> None:
    name = registry.names()[0]
    with pytest.raises(ValueError, match="twice"):
        registry.add(name, registry.get(name))


@pytest.mark.parametrize(("name", "target"), list(TARGETS.items()), ids=TARGETS.names())
def test_targets(name: str, target: Target) -> None:
    assert target.name == name
    assert target.summary
    assert target.source
    assert target.needs_output <= target.kernels
    assert target.int32_bias <= target.kernels
    assert target.activation_format in FORMATS
    assert target.kernels <= set(RULES.names())
    assert all(RULES.get(op).kind != "float" for op in target.kernels)
    assert target.opset_ceiling <= onnx.defs.onnx_opset_version()
    traits_of(name)


@pytest.mark.parametrize(("name", "form"), list(FORMS.items()), ids=FORMS.names())
def test_forms(name: str, form: Any) -> None:
    assert inspect.getdoc(form)
    assert list(inspect.signature(form).parameters) == ["bench", "node", "decisions"]


@pytest.mark.parametrize(("name", "method"), list(METHODS.items()), ids=METHODS.names())
def test_methods_give_sound_ranges(name: str, method: Any) -> None:
    text = inspect.getdoc(method) or ""
    assert all(heading in text for heading in ("What", "When to use", "Source"))
    spec = Spec(format=FORMATS.get("int8"))
    for values in ([0.0], [1.0], [-3.0, 0.5, 2.0], [1e-30, 1e-20], [5.0] * 100):
        histogram = Histogram.of(np.asarray(values, np.float32))
        chosen = method(histogram, spec)
        assert np.isfinite([chosen.lo, chosen.hi]).all()
        assert chosen.lo <= 0 <= chosen.hi
        assert params_from_range(chosen, spec).scale > 0


@pytest.mark.parametrize(("name", "fmt"), list(FORMATS.items()), ids=FORMATS.names())
def test_formats(name: str, fmt: Format) -> None:
    assert fmt.name == name
    assert fmt.bits > 0
    assert fmt.qmin < fmt.qmax
    assert fmt.source
    assert fmt.onnx_type in onnx.TensorProto.DataType.keys()  # noqa: SIM118
    assert fmt.scale_format in FORMATS
    assert fmt.zeros((2, 3)).shape == (2, 3)
