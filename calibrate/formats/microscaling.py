"""Block formats: small floats whose blocks of 32 or 16 share a scale of 8 bits.

=============  ===========  =====  ============  ======================================================================
name           element      block  scale         in ONNX
=============  ===========  =====  ============  ======================================================================
``mxfp4``      float4_e2m1  32     float8_e8m0   one DequantizeLinear with float8e8m0 scales (opset 24)
``mxfp6_*``    float6_*     32     float8_e8m0   the same (opset 28)
``mxfp8_*``    float8_*     32     float8_e8m0   the same (opset 24)
``nvfp4``      float4_e2m1  16     float8_e4m3   two in a chain: the first turns the codes of the scales into floats
                                                 with one float32 scale per tensor (opset 23)
=============  ===========  =====  ============  ======================================================================

A power of two is exact in float32: with its scales written as float32 a microscaling tensor computes the same values
and needs only the opset of its elements (blocks: 21, float4: 23), which is the form that runtimes without e8m0 take.

Source: OCP Microscaling Formats (MX) specification 1.0, table 1; NVIDIA 2025, "Pretraining Large Language Models with
NVFP4", section 2.
"""

from __future__ import annotations

from dataclasses import replace

from . import FORMATS, Format
from .float4 import E2M1, E2M3, E3M2
from .float8 import E4M3FN, E5M2, E8M0


def _microscaling(name: str, element: Format) -> None:
    FORMATS.add(
        name,
        replace(
            element,
            name=name,
            block_size=32,
            scale_format=E8M0.name,
            scale_rule="floor",
            min_opset=max(element.min_opset, E8M0.min_opset),
            plain_opset=element.min_opset,
            source="OCP Microscaling Formats 1.0",
        ),
    )


_microscaling("mxfp4", E2M1)
_microscaling("mxfp6_e2m3", E2M3)
_microscaling("mxfp6_e3m2", E3M2)
_microscaling("mxfp8_e4m3", E4M3FN)
_microscaling("mxfp8_e5m2", E5M2)

FORMATS.add(
    "nvfp4",
    replace(
        E2M1,
        name="nvfp4",
        block_size=16,
        scale_format=E4M3FN.name,
        scale_levels=2,
        source="NVIDIA 2025, Pretraining Large Language Models with NVFP4, section 2",
    ),
)
