"""LSTM, GRU and RNN: two weights, of the input and of the state.

Weight layouts: W ``[directions, gates * hidden, in]``, R ``[directions, gates * hidden, hidden]``. A row of gates has
one scale in both directions. Activations stay in float: errors of codes with a fixed scale would add up from step to
step. ONNX Runtime's DynamicQuantizeLSTM scales them anew at every step.

Source: ONNX operators LSTM-14, GRU-14 and RNN-14.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from . import OpRule, add


def _gates(_node: gs.Node, _rank: int) -> int | None:
    return 1


def _inputs(_node: gs.Node, _rank: int) -> int | None:
    return 2


for _op in ("LSTM", "GRU", "RNN"):
    add(
        OpRule(
            op=_op,
            kind="weighted",
            data=(0, 1, 2),
            weight=1,
            further_weights=(2,),
            out_axis=_gates,
            in_axis=_inputs,
            reason="multiplies by weights at every step: they are stored as codes; activations are scaled at run time",
        )
    )
