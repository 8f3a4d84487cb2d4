"""Operators that compute on codes and give their result a scale of its own, and those that a quantizer absorbs."""

from __future__ import annotations

from . import OpRule, add, add_each

for _op in ("Add", "Mul", "Sub", "Div"):
    add(OpRule(op=_op, kind="elementwise", data=(0, 1), reason="computes on codes when all its inputs are codes"))
add_each(
    ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"),
    "elementwise",
    "computes on codes when its input is codes",
)
add_each(("Relu", "Clip"), "absorbed", "absorbed by the quantizer behind it, whose codes end where it cuts")
