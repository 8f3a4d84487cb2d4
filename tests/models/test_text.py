"""Sentences and paragraphs of Python's help topics."""

from __future__ import annotations

from qpipe.models import text


def test_sentences_are_prose_of_the_stated_length():
    found = text.sentences()
    assert len(found) == len(set(found)) >= 1200
    for sentence in found:
        assert 6 <= len(sentence.split()) <= 40
        assert sentence[0].isupper()
        assert sentence[-1] in ".?!"
        assert not {"::=", ">>>"} & set(sentence.split())
        assert "\n" not in sentence


def test_order_is_that_of_a_hash_fixed_across_machines():
    assert text.stable_hash("qpipe") == int("0x" + __import__("hashlib").sha256(b"qpipe").hexdigest()[:16], 16)
    hashes = [text.stable_hash(sentence) for sentence in text.sentences()]
    assert hashes == sorted(hashes)


def test_sentences_are_in_the_topics():
    everything = " ".join(" ".join(t.split()) for t in text.topics().values())
    assert all(sentence in everything for sentence in text.sentences()[:200])


def test_paragraphs_keep_indents_and_lose_blank_lines():
    assert text.paragraphs("a\nb\n\n\n  c\n  d  \n \ne\n") == ["a\nb", "  c\n  d", "e"]
