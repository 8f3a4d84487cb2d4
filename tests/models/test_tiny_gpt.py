"""tiny_gpt: perplexity, causality, tokenizer, split, metric."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qpipe.calibrate.errors import DataError
from qpipe.models import tiny_gpt
from qpipe.models.tiny_gpt import corpus
from qpipe.models.tiny_gpt.tokenizer import VOCABULARY, Tokenizer, learn, merge, tokenizer

PERPLEXITY_BOUND = 40.0


@pytest.mark.torch
def test_float_perplexity(built, run):
    outputs = run("tiny_gpt", built("tiny_gpt"), tiny_gpt.evaluation_batches())
    # An untrained model has about 1024, a unigram model several hundred.
    assert 5 < tiny_gpt.score(outputs)["perplexity"] < PERPLEXITY_BOUND


@pytest.mark.torch
def test_size_and_tied_embedding(built):
    module = built("tiny_gpt")
    assert 1_000_000 <= sum(p.numel() for p in module.parameters()) <= 3_000_000
    assert {p.shape[0] for n, p in module.named_parameters() if p.shape[0] == tokenizer().size} == {1024}
    assert sum(p.shape[0] == 1024 for p in module.parameters()) == 1


@pytest.mark.torch
def test_no_token_sees_the_future(built, run):
    (batch,) = ({"input_ids": b["input_ids"][:2, :20]} for b in [next(tiny_gpt.evaluation_batches())])
    changed = {"input_ids": batch["input_ids"].copy()}
    changed["input_ids"][:, 12:] = 7
    before, after = (o["logits"] for o in run("tiny_gpt", built("tiny_gpt"), [batch, changed]))
    np.testing.assert_allclose(before[:, :12], after[:, :12], atol=1e-5)
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 0.1


@given(st.text())
def test_any_text_survives_encoding(text):
    tokens = tokenizer().encode(text)
    assert tokenizer().decode(tokens) == text
    assert all(0 <= token < 1024 for token in tokens)


def test_encoding_is_shorter_than_bytes():
    text = corpus.split_topics()[1]
    assert len(tokenizer().encode(text)) < 0.4 * len(text.encode())


def test_vocabulary_is_well_formed():
    merges = json.loads(VOCABULARY.read_text())["merges"]
    assert len(merges) == len({tuple(m) for m in merges}) == 768
    assert all(max(pair) < 256 + rank for rank, pair in enumerate(merges))


def test_learn_merges_the_most_frequent_pair_first():
    merges = learn("ab ab ab abc", 259)
    a, b, blank = ord("a"), ord("b"), ord(" ")
    assert merges == [(a, b), (blank, 256), (257, ord("c"))]
    assert Tokenizer(merges).encode("ab ab") == [256, 257]


def test_merge_goes_from_the_left():
    assert merge([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]


def test_no_held_out_paragraph_is_trained_on():
    from qpipe.models.text import paragraphs

    training, held_out = corpus.split_topics()
    seen = {" ".join(p.split()) for p in paragraphs(training)}
    unseen = {" ".join(p.split()) for p in paragraphs(held_out)}
    assert len(unseen) > 50
    assert len(seen) > 3 * len(unseen)
    assert not seen & unseen


def test_windows_overlap_by_the_target_only():
    found = corpus.windows(corpus.split_topics()[1], 128)
    np.testing.assert_array_equal(found[1:, 0], found[:-1, -1])
    few = corpus.windows(corpus.split_topics()[1], 128, 5)
    assert few.shape == (5, 129)
    assert {w.tobytes() for w in few} <= {w.tobytes() for w in found}


def test_batches_have_the_stated_shape():
    calibration, evaluation = list(tiny_gpt.calibration_batches()), list(tiny_gpt.evaluation_batches())
    assert [b["input_ids"].shape for b in calibration] == [(8, 128)] * 4
    assert sum(len(b["input_ids"]) for b in evaluation) >= 60
    assert {b["input_ids"].dtype for b in calibration + evaluation} == {np.dtype(np.int64)}
    assert all(b["input_ids"].shape[1] == 128 for b in evaluation)


def test_score_is_the_perplexity_of_the_next_token():
    batches = list(tiny_gpt.evaluation_batches())
    uniform = [{"logits": np.zeros((*b["input_ids"].shape, 1024), np.float32)} for b in batches]
    assert tiny_gpt.score(uniform)["perplexity"] == pytest.approx(1024)
    # The right next token gets probability 1/2, the other 1023 share the rest.
    informed = [{"logits": o["logits"].copy()} for o in uniform]
    for output, batch in zip(informed, batches, strict=True):
        following = batch["input_ids"][:, 1:]
        np.put_along_axis(output["logits"][:, :-1], following[..., None], math.log(1023), axis=-1)
    last = 1 / 128
    low, high = tiny_gpt.score(informed)["perplexity"], 2 ** (1 - last) * 1024**last
    assert low == pytest.approx(high, rel=1e-5)


def test_score_refuses_missing_windows():
    with pytest.raises(DataError, match="evaluation data"):
        tiny_gpt.score([{"logits": np.zeros((1, 128, 1024), np.float32)}])


@pytest.mark.torch
def test_training_is_reproducible_and_learns(monkeypatch):
    import torch
    from qpipe.models.tiny_gpt import train as script

    monkeypatch.setattr(script, "training_text", lambda: corpus.split_topics()[0][:20_000])
    threads = torch.get_num_threads()
    try:
        first, second = (script.train(steps=20, batch=4) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert script.perplexity(first) < 900
