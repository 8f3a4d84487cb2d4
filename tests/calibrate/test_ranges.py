"""Calibration methods: the error model they search by, and what each promises for every format and any data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.metrics import mse
from qpipe.calibrate.qarray import Range, Spec, fake_quant, params_from_range
from qpipe.calibrate.ranges import METHODS, entropy, resolve
from qpipe.calibrate.ranges.auto import choose
from qpipe.calibrate.ranges.entropy import Reference, divergence
from qpipe.calibrate.ranges.error import expected_mse, grid
from qpipe.calibrate.ranges.percentile import Percentile
from qpipe.calibrate.stats.histogram import Histogram

SPECS = {
    "int8": Spec(format=FORMATS.get("int8")),
    "int8 narrow": Spec(format=FORMATS.get("int8"), narrow_range=True),
    "int8 7 bits": Spec(format=FORMATS.get("int8"), reduce_bits=1),
    "int8 affine": Spec(format=FORMATS.get("int8"), symmetric=False),
    "uint8": Spec(format=FORMATS.get("uint8"), symmetric=False),
    "uint8 middle": Spec(format=FORMATS.get("uint8")),
    "int4": Spec(format=FORMATS.get("int4")),
    "uint4": Spec(format=FORMATS.get("uint4"), symmetric=False),
    "int2": Spec(format=FORMATS.get("int2")),
    "int16": Spec(format=FORMATS.get("int16")),
    "float8_e4m3fn": Spec(format=FORMATS.get("float8_e4m3fn")),
    "float8_e5m2": Spec(format=FORMATS.get("float8_e5m2")),
    "float4_e2m1": Spec(format=FORMATS.get("float4_e2m1")),
}


def samples(kind: str, count: int = 100_000) -> np.ndarray:
    """Return float32 values of a named distribution."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    normal = rng.standard_normal(count)
    values = {
        "gaussian": lambda: normal,
        "laplace": lambda: rng.laplace(size=count),
        "log-normal": lambda: rng.lognormal(0, 1, count),
        "one-sided": lambda: np.maximum(normal, 0),
        "outliers": lambda: np.where(rng.random(count) < 1e-3, 40 * normal, normal),
        "skewed": lambda: normal - 3 * rng.exponential(size=count),
    }
    return values[kind]().astype(np.float32)


KINDS = ["gaussian", "laplace", "log-normal", "one-sided", "outliers"]
INT8, UINT8 = SPECS["int8"], SPECS["uint8"]
ANY = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


def measured(x: np.ndarray, rng: Range, spec: Spec) -> float:
    """Return the error that quantizing the raw values makes."""
    return mse(x, fake_quant(x, params_from_range(rng, spec)))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_expected_error_is_the_measured_error(kind, spec):
    x = samples(kind)
    histogram = Histogram.of(x)
    for fraction in (1.0, 0.6, 0.2):
        rng = Range.of(fraction * histogram.lo, fraction * histogram.hi)
        assert expected_mse(histogram, rng, spec) == pytest.approx(measured(x, rng, spec), rel=0.02)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@settings(max_examples=25)
@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.integers(-300, 300).map(lambda v: v / 4)))
def test_values_that_are_exact_in_bfloat16_have_their_exact_error(spec, x):
    x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    histogram = Histogram.of(x)
    rng = Range.of(histogram.lo, histogram.hi * 0.75)
    scale = float(params_from_range(rng, spec).scale)
    assert expected_mse(histogram, rng, spec) == pytest.approx(
        measured(x, rng, spec), rel=1e-3, abs=1e-9 * scale**2 + 1e-13 * histogram.amax**2
    )


@pytest.mark.parametrize("name", METHODS.names())
def test_expected_error_of_nothing_is_zero(name):
    spec = SPECS["int8"]
    assert expected_mse(Histogram.empty(), METHODS.get(name)(Histogram.empty(), spec), spec) == 0.0


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float4_e2m1", "nf4"])
def test_grid_is_the_format(name):
    number = FORMATS.get(name)
    levels, between, base = grid(number)
    assert (np.diff(levels) > 0).all()
    assert levels[0] == number.qmin
    assert levels[-1] == number.qmax
    assert 0.0 in levels
    assert np.allclose(between, (levels[1:] + levels[:-1]) / 2)
    assert base[np.searchsorted(levels, 0.0)] == 0.0
    # The integral of the squared distance from the nearest code, over the whole grid, by small steps.
    t = np.linspace(levels[0], levels[-1], 2_000_001)
    nearest = levels[np.searchsorted(between, t)]
    assert base[-1] - base[0] == pytest.approx(float(np.trapezoid((t - nearest) ** 2, t)), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e28])
def test_any_magnitude_is_finite(scale):
    histogram = Histogram.of(samples("gaussian", 1000) * np.float32(scale))
    for spec in SPECS.values():
        error = expected_mse(histogram, Range.of(histogram.lo, histogram.hi), spec)
        assert np.isfinite(error)
        assert error >= 0


@pytest.mark.parametrize("name", METHODS.names())
@settings(max_examples=40)
@given(x=ANY, spec=st.sampled_from(list(SPECS.values())))
def test_every_method_gives_a_usable_range(name, x, spec):
    histogram = Histogram.of(x)
    rng = METHODS.get(name)(histogram, spec)
    assert rng.lo.shape == rng.hi.shape == ()
    assert np.isfinite([rng.lo, rng.hi]).all()
    assert min(histogram.lo, 0.0) <= rng.lo <= 0.0 <= rng.hi <= max(histogram.hi, 0.0)
    if histogram.amax >= 2.0**-120:
        assert rng.amax > 0
    params = params_from_range(rng, spec)
    assert np.isfinite(params.scale)
    assert params.scale >= np.float32(2.0**-126)


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4e38, -1e30])
def test_what_is_no_measurement_never_enters_a_range(name, bad):
    x = samples("gaussian", 5000)
    spoiled = np.append(x, np.full(20, bad, np.float32))
    for spec in (INT8, UINT8, SPECS["float8_e4m3fn"]):
        assert METHODS.get(name)(Histogram.of(spoiled), spec) == METHODS.get(name)(Histogram.of(x), spec)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_constant_keeps_its_value(name):
    histogram = Histogram.of(np.full(100, -0.3, np.float32))
    for spec in SPECS.values():
        assert METHODS.get(name)(histogram, spec).lo == np.float32(-0.3)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_tensor_of_almost_only_zeros_keeps_its_range(name):
    x = np.zeros(1_000_000, np.float32)
    x[::20_000] = np.linspace(0.5, 2.0, 50)
    rng = METHODS.get(name)(Histogram.of(x), UINT8)
    assert rng.hi >= 1.5


def test_minmax_is_exact():
    x = samples("skewed")
    assert METHODS.get("minmax")(Histogram.of(x), INT8) == Range.of(x.min(), x.max())


@given(ANY)
def test_percentile_100_is_minmax_exactly(x):
    histogram = Histogram.of(x)
    for spec in (INT8, UINT8):
        assert resolve("percentile:100")(histogram, spec) == METHODS.get("minmax")(histogram, spec)


@given(ANY, st.lists(st.floats(0.01, 100.0), min_size=2, max_size=6))
def test_percentile_is_monotone(x, percents):
    histogram = Histogram.of(x)
    for spec in (INT8, UINT8):
        ranges = [Percentile(p)(histogram, spec) for p in sorted(percents)]
        assert (np.diff([r.hi for r in ranges]) >= 0).all()
        assert (np.diff([r.lo for r in ranges]) <= 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "skewed"])
@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
def test_percentile_is_that_of_the_values(kind, percent):
    x = samples(kind)
    histogram = Histogram.of(x)
    kept = x[x != 0]
    limit = np.quantile(np.abs(kept), percent / 100, method="inverted_cdf")
    assert resolve(f"percentile:{percent}")(histogram, INT8).amax == pytest.approx(limit, rel=2.0**-6)
    rng = resolve(f"percentile:{percent}")(histogram, UINT8)
    assert rng.hi == pytest.approx(max(np.quantile(kept, percent / 100, method="inverted_cdf"), 0), rel=2.0**-6)
    assert -rng.lo == pytest.approx(max(np.quantile(-kept, percent / 100, method="inverted_cdf"), 0), rel=2.0**-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_mse_is_within_two_percent_of_brute_force_on_the_values(kind, spec):
    x = samples(kind, 20_000)
    histogram = Histogram.of(x)
    solved = METHODS.get("mse")(histogram, spec)
    if spec.symmetric or histogram.lo >= 0:
        limits = histogram.amax * 2.0 ** -np.arange(0, 7, 0.06)
        ranges = [Range.of(max(histogram.lo, -t), min(histogram.hi, t)) for t in limits]
        best = min(measured(x, rng, spec) for rng in ranges)
    else:
        steps = 2.0 ** -np.arange(0, 6, 0.25)
        thin = np.sort(x)[::10]
        thin = np.concatenate([thin, [x.min(), x.max()]])
        pairs = [(a, b) for a in steps for b in steps]
        pairs.sort(key=lambda p: measured(thin, Range.of(histogram.lo * p[0], histogram.hi * p[1]), spec))
        near = {(a * c, b * d) for a, b in pairs[:12] for c in (1, 0.92) for d in (1, 0.92)}
        best = min(measured(x, Range.of(histogram.lo * a, histogram.hi * b), spec) for a, b in near)
    assert measured(x, solved, spec) <= 1.02 * best


@settings(max_examples=40)
@given(ANY, st.sampled_from(list(SPECS.values())))
def test_mse_is_never_worse_than_minmax(x, spec):
    histogram = Histogram.of(x)
    solved, full = (expected_mse(histogram, METHODS.get(n)(histogram, spec), spec) for n in ("mse", "minmax"))
    assert solved <= full * (1 + 1e-3)


def test_mse_depends_on_the_format():
    histogram = Histogram.of(samples("laplace"))
    limits = [float(METHODS.get("mse")(histogram, SPECS[name]).amax) for name in ("int16", "int8", "int4", "int2")]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] > 2 * limits[2]


@pytest.mark.parametrize(("name", "far"), [("int8", 20), ("int8", 60), ("uint8", 60), ("uint8", 1000), ("int4", 20)])
def test_entropy_clips_a_planted_tail(name, far):
    rng = np.random.default_rng(4)
    x = np.abs(rng.standard_normal(200_000)).astype(np.float32)
    bulk = float(x.max())
    x[:20] = far * rng.uniform(0.9, 1.0, 20)
    limit = float(METHODS.get("entropy")(Histogram.of(x), SPECS[name]).hi)
    assert limit < 1.2 * bulk
    assert limit > 2.0


def divergence_by_definition(counts: np.ndarray, beyond: float, kept: int, fractions: np.ndarray) -> float:
    """Compute one divergence bin by bin, as the method is described."""
    p = counts[:kept].astype(np.float64).copy()
    q = np.zeros(kept)
    edges = np.rint(fractions * kept).astype(int)
    for first, last in itertools.pairwise(edges):
        filled = p[first:last] > 0
        if filled.any():
            q[first:last][filled] = p[first:last].sum() / filled.sum()
    p[-1] += counts[kept:].sum() + beyond
    if (q[p > 0] == 0).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    keep = p > 0
    return float(np.sum(p[keep] * np.log(p[keep] / q[keep])))


@settings(max_examples=60)
@given(
    hnp.arrays(np.int64, st.integers(8, 60), elements=st.sampled_from([0, 0, 1, 2, 5, 100])),
    st.integers(2, 8),
    st.sampled_from([0.0, 3.0]),
)
def test_divergence_by_prefix_sums_is_the_definition(counts, codes, beyond):
    thresholds = np.flatnonzero(counts)[np.flatnonzero(counts) >= codes] + 1
    fractions = np.linspace(0, 1, codes + 1)
    found = divergence(Reference.of(counts.astype(np.float64), beyond), thresholds, fractions)
    expected = [divergence_by_definition(counts, beyond, int(t), fractions) for t in thresholds]
    assert np.allclose(found, expected, atol=1e-9)


def test_entropy_finds_the_best_of_all_thresholds():
    """The coarse-to-fine search is no worse than trying every single threshold, to a twentieth."""
    for kind in KINDS:
        histogram = Histogram.of(samples(kind))
        fractions = np.linspace(0, 1, 129)
        counts, beyond, _ = entropy._uniform_counts(histogram, 128)
        reference = Reference.of(counts, beyond)
        everything = divergence(reference, np.arange(128, len(counts) + 1), fractions)
        chosen = entropy._best_threshold(reference, fractions)
        assert len(counts) >= 2048
        assert everything[chosen - 128] <= 1.05 * everything.min() + 1e-6


def test_auto_takes_the_smallest_error_that_clips_least():
    histogram, spec = Histogram.of(samples("laplace")), SPECS["int4"]
    solved = {name: method(histogram, spec) for name, method in METHODS.items()}
    errors = {name: expected_mse(histogram, rng, spec) for name, rng in solved.items()}
    name, rng = choose(histogram, spec)
    assert errors[name] <= 1.01 * min(errors.values())
    assert errors["minmax"] > 1.5 * errors[name]
    assert solved["auto"] == rng
    uniform = Histogram.of(np.linspace(-1, 1, 10_001, dtype=np.float32))
    assert choose(uniform, INT8)[0] == "minmax"


def test_auto_with_a_large_tolerance_clips_nothing():
    histogram = Histogram.of(samples("outliers"))
    assert resolve("auto:1e9")(histogram, SPECS["int4"]) == METHODS.get("minmax")(histogram, SPECS["int4"])


def test_resolve_sets_the_option():
    assert resolve("percentile:99.5") == Percentile(99.5)
    assert resolve("mse") is METHODS.get("mse")


@pytest.mark.parametrize(
    "text", ["percentile:0", "percentile:101", "percentile:x", "percentile:", "auto:-1", "auto:nan"]
)
def test_resolve_refuses_bad_values(text):
    with pytest.raises(RecipeError, match="does not take"):
        resolve(text)


@pytest.mark.parametrize(("text", "message"), [("mse:3", "no options"), ("percentil", "no calibration method")])
def test_resolve_refuses_unknown_things(text, message):
    with pytest.raises(RecipeError, match=message):
        resolve(text)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_documents_itself(name):
    text = METHODS.get(name).__doc__
    for heading in ("What:", "When to use:", "Options:", "Source:"):
        assert heading in text
