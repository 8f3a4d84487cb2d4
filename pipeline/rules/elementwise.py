"""Operators that compute on codes and give their result a scale of its own, and those that a quantizer absorbs."""

from __future__ import annotations

from . import OpRule, add

for _op in ("Add", "Mul", "Sub"):
    add(OpRule(op=_op, kind="elementwise", data=(0, 1), reason="computes on codes when all its inputs are codes"))
for _op in ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"):
    add(OpRule(op=_op, kind="elementwise", data=(0,), reason="computes on codes when its input is codes"))
for _op in ("Relu", "Clip"):
    add(OpRule(op=_op, kind="absorbed", data=(0,), reason="absorbed by the quantizer behind it"))
