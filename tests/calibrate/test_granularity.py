"""Granularity: shapes, spreading and reducing, against loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qpipe.calibrate.granularity import PER_TENSOR, Granularity, per_block, per_channel


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (PER_TENSOR, ()),
        (per_channel(0), (4, 1, 1)),
        (per_channel(1), (1, 6, 1)),
        (per_channel(-1), (1, 1, 5)),
        (per_block(0, 2), (2, 6, 5)),
        (per_block(1, 4), (4, 2, 5)),
        (per_block(-1, 5), (4, 6, 1)),
        (per_block(2, 64), (4, 6, 1)),
    ],
)
def test_scale_shape(granularity, expected):
    assert granularity.scale_shape((4, 6, 5)) == expected


@st.composite
def cases(draw):
    x = draw(
        hnp.arrays(
            np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=st.floats(-9, 9, width=32)
        )
    )
    axis = draw(st.one_of(st.none(), st.integers(-x.ndim, x.ndim - 1)))
    return x, Granularity(axis=axis, block_size=0 if axis is None else draw(st.integers(0, 5)))


def scale_index(index, granularity, rank):
    """The index of the scale that the element at ``index`` uses."""
    if granularity.axis is None:
        return ()
    axis = granularity.axis % rank
    if granularity.block_size:
        return tuple(i // granularity.block_size if k == axis else i for k, i in enumerate(index))
    return tuple(i if k == axis else 0 for k, i in enumerate(index))


@settings(deadline=None)
@given(cases())
def test_spread_gives_every_element_its_scale(case):
    x, granularity = case
    scales = np.arange(np.prod(granularity.scale_shape(x.shape)), dtype=np.float32).reshape(
        granularity.scale_shape(x.shape)
    )
    spread = np.broadcast_to(granularity.spread(scales, x.shape), x.shape)
    for index in np.ndindex(*x.shape):
        assert spread[index] == scales[scale_index(index, granularity, x.ndim)]


@settings(deadline=None)
@given(cases(), st.sampled_from([np.minimum, np.maximum]))
def test_reduce_sees_every_element_of_its_group_and_no_other(case, ufunc):
    x, granularity = case
    expected = {}
    for index in np.ndindex(*x.shape):
        key = scale_index(index, granularity, x.ndim)
        expected[key] = ufunc(expected[key], x[index]) if key in expected else x[index]
    reduced = granularity.reduce(x, ufunc)
    assert reduced.shape == granularity.scale_shape(x.shape)
    for key, value in expected.items():
        assert reduced[key] == value


def test_blocks_need_an_axis():
    with pytest.raises(ValueError, match="axis"):
        Granularity(block_size=32)


def test_block_size_is_not_negative():
    with pytest.raises(ValueError, match="-1"):
        Granularity(axis=0, block_size=-1)
