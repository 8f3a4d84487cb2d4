"""QuantEase: sweeps that never make GPTQ's output error larger."""

import numpy as np
import pytest
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import per_block, per_channel
from qpipe.calibrate.qarray import Spec, dequantize, fake_quant
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WeightStats, output_mse
from qpipe.calibrate.weights.gptq import Gptq, damped
from qpipe.calibrate.weights.quantease import Quantease


def layer(channels=96, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((channels // 3, channels))
    x = rng.standard_normal((6000, channels // 3)) @ mixing + 0.3 * rng.standard_normal((6000, channels))
    x = x.astype(np.float32)
    w = rng.standard_normal((40, channels)).astype(np.float32)
    return w, WeightStats(gram=Gram.of(x[:3000])), Gram.of(x[3000:])


SPECS = [
    Spec(format=FORMATS.get("int4"), granularity=per_block(1, 32)),
    Spec(format=FORMATS.get("uint4"), granularity=per_block(1, 20), symmetric=False),
    Spec(format=FORMATS.get("int2"), granularity=per_channel(0)),
    Spec(format=FORMATS.get("float4_e2m1"), granularity=per_block(1, 16)),
    Spec(format=FORMATS.get("int8"), granularity=per_channel(0), narrow_range=True, pair_limit=128),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format.name} {s.granularity.block_size}")
def test_every_sweep_lowers_the_error_that_it_works_on(spec):
    w, stats, _ = layer()
    objective = Gram(matrix=damped(stats.gram, 0.05), tokens=1)
    errors = [output_mse(w, dequantize(Quantease(sweeps=n)(w, spec, stats)), objective) for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


def test_without_sweeps_it_is_gptq():
    w, stats, _ = layer()
    np.testing.assert_array_equal(Quantease(sweeps=0)(w, SPECS[0], stats).q, Gptq()(w, SPECS[0], stats).q)


def test_it_earns_its_place_on_data_it_has_not_seen():
    w, stats, held_out = layer()
    for spec, gain in ((SPECS[0], 0.97), (SPECS[2], 0.95)):
        first, refined = (dequantize(m(w, spec, stats)) for m in (Gptq(), Quantease()))
        assert output_mse(w, refined, held_out) < gain * output_mse(w, first, held_out)


def test_in_the_end_no_single_code_can_be_improved():
    """After enough sweeps each code is the best one given all others: coordinate descent has arrived."""
    w, stats, _ = layer(channels=70)  # not a multiple of the batch
    spec = SPECS[0]
    settled = Quantease(sweeps=60)(w, spec, stats)
    hessian, values = damped(stats.gram, 0.05), dequantize(settled).astype(np.float64)
    pull = (w - values) @ hessian / np.diag(hessian)
    assert (fake_quant(values + pull, settled.params) == dequantize(settled)).mean() > 0.999
