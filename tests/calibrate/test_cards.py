"""Cards against the definitions of the formats and against `struct`."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.cards import as_data, format_card, render, value_card
from qpipe.calibrate.errors import RecipeError, UsageError
from qpipe.calibrate.formats import FORMATS

NAMES = FORMATS.names()


@pytest.mark.parametrize(
    ("name", "fields", "bias", "largest", "smallest_normal", "smallest_subnormal"),
    [
        ("float64", (1, 11, 52), 1023, 1.7976931348623157e308, 2.0**-1022, 5e-324),
        ("float32", (1, 8, 23), 127, (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149),
        ("float16", (1, 5, 10), 15, 65504, 2.0**-14, 2.0**-24),
        ("bfloat16", (1, 8, 7), 127, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133),
        ("float8_e4m3fn", (1, 4, 3), 7, 448, 2.0**-6, 2.0**-9),
        ("float8_e5m2", (1, 5, 2), 15, 57344, 2.0**-14, 2.0**-16),
        ("float8_e4m3fnuz", (1, 4, 3), 8, 240, 2.0**-7, 2.0**-10),
        ("float8_e5m2fnuz", (1, 5, 2), 16, 57344, 2.0**-15, 2.0**-17),
        ("float8_e8m0", (0, 8, 0), 127, 2.0**127, 2.0**-127, None),
        ("float6_e2m3", (1, 2, 3), 1, 7.5, 1, 0.125),
        ("float6_e3m2", (1, 3, 2), 3, 28, 0.25, 0.0625),
        ("float4_e2m1", (1, 2, 1), 1, 6, 1, 0.5),
        ("mxfp4", (1, 2, 1), 1, 6, 1, 0.5),
    ],
)
def test_card_of_a_float_format(name, fields, bias, largest, smallest_normal, smallest_subnormal):
    card = format_card(name)
    assert (card.sign_bits, card.exponent_bits, card.mantissa_bits) == fields
    assert (card.bias, card.largest, card.smallest_normal) == (bias, largest, smallest_normal)
    assert card.smallest_subnormal == smallest_subnormal


@pytest.mark.parametrize(
    ("name", "infinity", "nan"),
    [
        ("float32", True, True),
        ("bfloat16", True, True),
        ("float8_e5m2", True, True),
        ("float8_e4m3fn", False, True),
        ("float8_e5m2fnuz", False, True),
        ("float8_e8m0", False, True),
        ("float6_e3m2", False, False),
        ("float4_e2m1", False, False),
        ("int8", False, False),
        ("nf4", False, False),
    ],
)
def test_card_says_which_special_values_have_codes(name, infinity, nan):
    card = format_card(name)
    assert (card.has_infinity, card.has_nan) == (infinity, nan)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("uint2", (0, 1, 2, 3)),
        ("int2", (0, 1, -2, -1)),
        ("int4", (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)),
        ("float4_e2m1", (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)),
    ],
)
def test_all_values_of_small_formats_by_code(name, values):
    assert format_card(name).values == values


def test_only_formats_of_at_most_four_bits_list_their_values():
    for name in NAMES:
        card = format_card(name)
        assert len(card.values) == (2**card.bits if card.bits <= 4 else 0)


def test_decimal_digits():
    digits = {name: format_card(name).decimal_digits for name in ("float64", "float32", "float16", "bfloat16", "int8")}
    assert digits == {"float64": 15.95, "float32": 7.22, "float16": 3.31, "bfloat16": 2.41, "int8": 2.11}


def test_ten_and_a_half_in_float32():
    card = value_card(10.5, "float32")
    assert (card.sign, card.exponent, card.mantissa) == ("0", "10000010", "01010000000000000000000")
    assert card.code.value == 10.5
    assert card.code.error == 0


def test_codes_of_ten_and_a_half_with_a_scale_of_one():
    card = value_card(10.5, "int8", scale=1.0)
    codes = {code.format: code for code in card.others}
    assert (codes["int8"].bits, codes["int8"].value, codes["int8"].error) == ("00001010", 10, -0.5)
    assert (codes["uint4"].bits, codes["uint4"].value) == ("1010", 10)
    assert (codes["int4"].bits, codes["int4"].value, codes["int4"].error) == ("0111", 7, -3.5)
    assert (codes["float8_e4m3fn"].bits, codes["float8_e4m3fn"].value) == ("01010010", 10)
    assert (codes["float4_e2m1"].bits, codes["float4_e2m1"].value) == ("0111", 6)
    assert codes["int8"].relative_error == 0.5 / 10.5
    assert codes["float16"].scale is None


def test_without_a_scale_the_value_is_the_largest_magnitude():
    card = value_card(10.5, "int8")
    codes = {code.format: code for code in card.others}
    assert codes["int8"].bits == "01111111"
    assert codes["int8"].scale == np.float32(10.5 / 127)
    assert codes["uint8"].bits == "11111111"
    assert codes["uint8"].scale == np.float32(10.5 / 255)
    assert (codes["mxfp4"].scale, codes["mxfp4"].value) == (2, 12)
    assert (value_card(-7, "uint8").code.bits, value_card(-7, "uint8").code.zero_point) == ("00000000", 255)


@settings(deadline=None)
@given(value=st.floats())
def test_bits_of_the_native_formats_are_those_of_struct(value):
    for name, pack, unpack in (("float64", "d", "Q"), ("float32", "f", "I"), ("float16", "e", "H")):
        code = value_card(value, name).code
        try:
            packed = struct.pack(pack, value)
        except OverflowError:
            assert math.isinf(code.value)
            continue
        if math.isnan(value):
            assert math.isnan(code.value)
        else:
            assert int(code.bits, 2) == struct.unpack(unpack, packed)[0]
            assert code.value == struct.unpack(pack, packed)[0]


@settings(deadline=None)
@given(value=st.floats(-1e30, 1e30), name=st.sampled_from(sorted(set(NAMES) - {"float8_e8m0"})))
def test_the_three_fields_are_the_code_and_errors_are_differences(value, name):
    card = value_card(value, name)
    assert card.sign + card.exponent + card.mantissa == card.code.bits
    assert len(card.code.bits) == FORMATS.get(name).bits
    assert card.code.error == card.code.value - value
    assert card.code in card.others


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_plain_data_and_text(name):
    card = format_card(name)
    assert json.loads(json.dumps(as_data(card), allow_nan=False))["name"] == name
    text = render(card)
    assert text.startswith(name + "\n")
    assert f"{card.largest:.9g}" in text
    assert all(len(line) <= 120 and line == line.rstrip() for line in text.split("\n"))


@pytest.mark.parametrize("value", [10.5, 0.1, -0.0, 1e300, math.inf, -math.inf, math.nan])
def test_value_cards_are_plain_data_and_text(value):
    card = value_card(value, "float16")
    json.dumps(as_data(card), allow_nan=False)
    lines = render(card).split("\n")
    assert lines[1].split()[1:] == [card.sign, card.exponent, card.mantissa]
    assert {line.split()[0] for line in lines[6:]} == {code.format for code in card.others}


def test_text_shows_the_exact_value():
    assert "0.100000001490116119384765625" in render(value_card(0.1, "float32"))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(UsageError, match="positive"):
        value_card(1.0, "int8", scale=scale)


def test_unknown_format_is_refused_with_a_suggestion():
    with pytest.raises(RecipeError, match="int9"):
        format_card("int9")


def test_scales_for_a_given_largest_magnitude():
    codes = {code.format: code for code in value_card(10.5, "float32", amax=16.0).others}
    assert (codes["int8"].bits, codes["int8"].scale) == ("01010011", np.float32(16 / 127))
    assert codes["int8"].value == np.float32(83 * np.float32(16 / 127))
    assert (codes["mxfp4"].scale, codes["mxfp4"].value) == (4, 12)
    negative = {code.format: code for code in value_card(-10.5, "float32", amax=16.0).others}
    assert negative["uint8"].zero_point == 255
    assert negative["uint8"].value == pytest.approx(-10.5, abs=16 / 255)
    assert value_card(math.inf, "int8", amax=16.0).code.value == pytest.approx(16)


@pytest.mark.parametrize("asked", [{"amax": 0.0}, {"amax": math.nan}, {"amax": 1.0, "scale": 1.0}])
def test_a_largest_magnitude_that_says_nothing_is_refused(asked):
    with pytest.raises(UsageError):
        value_card(1.0, "int8", **asked)
