"""AWQ's clip search looks at the output, block by block."""

import numpy as np
import pytest
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_block, per_channel
from qpipe.calibrate.qarray import Range, Spec, dequantize, fake_quant, minmax_range, params_from_range
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WeightStats, output_mse
from qpipe.calibrate.weights.awq_clip import AwqClip
from qpipe.calibrate.weights.rtn import Rtn, RtnMse


def layer(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3000, 16)) @ rng.standard_normal((16, 64)) + 0.2 * rng.standard_normal((3000, 64))
    w = rng.standard_t(3, (40, 64)).astype(np.float32)
    x = x.astype(np.float32)
    return w, WeightStats(gram=Gram.of(x[:1500])), Gram.of(x[1500:])


@pytest.mark.parametrize(
    "granularity",
    [PER_TENSOR, per_channel(0), per_block(1, 16), per_block(1, 24)],
    ids=["tensor", "channel", "16", "24"],
)
@pytest.mark.parametrize("fmt", ["int4", "uint4"])
def test_outputs_are_better_than_by_the_error_of_the_weights(granularity, fmt):
    w, stats, held_out = layer()
    spec = Spec(format=FORMATS.get(fmt), granularity=granularity, symmetric=fmt == "int4")
    errors = [output_mse(w, dequantize(m(w, spec, stats)), held_out) for m in (Rtn(), RtnMse(), AwqClip())]
    assert errors[2] < 0.97 * errors[1] < errors[0]


@pytest.mark.parametrize("granularity", [per_channel(1), per_block(0, 8)])
def test_a_scale_of_one_input_needs_no_more_than_its_energy(granularity):
    w, stats, _ = layer()
    spec = Spec(format=FORMATS.get("int4"), granularity=granularity)
    np.testing.assert_array_equal(AwqClip()(w, spec, stats).q, RtnMse()(w, spec, stats).q)


def test_each_block_takes_the_range_that_costs_its_part_of_the_output_least():
    w, stats, _ = layer()
    spec = Spec(format=FORMATS.get("int4"), granularity=per_block(1, 16))
    full = minmax_range(w, spec.granularity)
    found = AwqClip()(w, spec, stats)
    block = slice(16, 32)
    gram = Gram(matrix=stats.gram.matrix[block, block], tokens=1)

    def cost(values, row):
        return output_mse(w[row : row + 1, block], values[row : row + 1, block], gram)

    tried = [
        fake_quant(w, params_from_range(Range.of(full.lo * np.float32(r), full.hi * np.float32(r)), spec))
        for r in np.linspace(1, 0.3, 24)
    ]
    for row in range(len(w)):
        assert cost(dequantize(found), row) <= min(cost(values, row) for values in tried) * (1 + 1e-4)
