"""Vectors of blocks: the hashed ones against TF-IDF counted by hand, the others against what makes them."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from liveselect.datamodules.clusters.embedding import HashedEmbedder, ReadyVectors, TextEmbedder, make_embedder
from liveselect.datamodules.pools.tokenizers import train_bpe


def blocks(rows=14, length=9, vocab=30, seed=0):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def ngrams(row):
    return Counter([(a,) for a in row] + list(pairwise(row)))


def tf_idf(rows):
    """Dense TF-IDF of tokens and pairs: log(1 + count), scaled to length 1, times the smooth inverse frequency."""
    counts = [ngrams(row) for row in rows.tolist()]
    terms = sorted(set().union(*counts))
    frequency = Counter(term for count in counts for term in count)
    table = np.array([[math.log1p(count[term]) for term in terms] for count in counts])
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    return table * np.array([math.log((1 + len(rows)) / (1 + frequency[term])) + 1 for term in terms])


def distances(vectors):
    return np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)


def test_with_all_directions_the_hashed_vectors_keep_the_distances_of_tf_idf():
    rows = blocks()
    embedder = HashedEmbedder(dimensions=100, buckets=1 << 20)
    embedder.fit(rows)
    assert embedder.dimensions == len(rows) - 1
    vectors = embedder.embed(np.arange(len(rows)), rows)
    # one direction of fourteen is left out: the distances can only shrink, and by little
    exact, found = distances(tf_idf(rows)), distances(vectors)
    assert (found <= exact + 1e-5).all()
    singular = np.linalg.svd(tf_idf(rows), compute_uv=False)
    assert ((exact**2 - found**2) <= 4 * singular[-1] ** 2 + 1e-5).all()


def test_the_leading_directions_hold_as_much_as_any_of_that_number_can():
    rows = blocks(rows=40)
    embedder = HashedEmbedder(dimensions=5, buckets=1 << 20)
    embedder.fit(rows)
    vectors = embedder.embed(np.arange(40), rows) + embedder._mean
    best = np.linalg.svd(tf_idf(rows), compute_uv=False)[:5]
    assert np.linalg.svd(vectors, compute_uv=False) == pytest.approx(best, rel=0.02)


def test_the_sample_lies_around_the_origin_and_batches_do_not_matter():
    rows = blocks(rows=300)
    embedder = HashedEmbedder(dimensions=16, buckets=1 << 12)
    embedder.fit(rows)
    whole = embedder.embed(np.arange(300), rows)
    assert np.abs(whole.mean(axis=0)).max() < 1e-5
    parts = [embedder.embed(ids, rows[ids]) for ids in np.split(np.arange(300), [1, 7, 200])]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_one_block_has_nothing_to_be_told_apart_from():
    with pytest.raises(ValueError, match="at least two blocks"):
        HashedEmbedder().fit(blocks(rows=1))


def test_ready_vectors_are_those_of_the_ids(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(6, 3))
    np.save(tmp_path / "v.npy", vectors)
    for form in (vectors, tmp_path / "v.npy"):
        np.testing.assert_allclose(ReadyVectors(form, 6).embed(np.array([4, 1]), blocks(2)), vectors[[4, 1]], atol=1e-6)
    with pytest.raises(ValueError, match=r"for each of the pool's 7 blocks, got an array of shape \(6, 3\)"):
        make_embedder(f"vectors:{tmp_path / 'v.npy'}", 7, None)


@pytest.mark.parametrize("spec", ["tfidf", "encoder:", "vectors:", "hashed:3"])
def test_unknown_embeddings_are_answered_with_those_there_are(spec):
    with pytest.raises(ValueError, match=r"of the form hashed, encoder:NAME, static:NAME or vectors:FILE\.npy"):
        make_embedder(spec, 3, None)


def test_a_pool_without_a_tokenizer_has_no_text_for_an_encoder():
    with pytest.raises(ValueError, match="made from token ids without a tokenizer"):
        make_embedder("encoder:any", 3, None)


TEXTS = ["a short text", "a much longer text that says several things about nothing at all", "other words"] * 20


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = train_bpe(TEXTS, 300)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251 - the weights of the encoder
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(path)
    return path, tokenizer, model.eval()


def test_an_encoder_gives_the_mean_state_of_each_text_whatever_it_is_padded_to(encoder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    path, tokenizer, model = encoder
    embedder = make_embedder(f"encoder:{path}", 3, lambda ids: [TEXTS[i] for i in ids[:, 0].tolist()])
    assert isinstance(embedder, TextEmbedder)
    ids = torch.arange(40).view(-1, 1)
    embedder.fit(ids)
    assert embedder.dimensions == 16
    vectors = embedder.embed(ids.numpy().ravel(), ids)
    for index in (0, 1, 2, 39):
        tokens = torch.tensor([tokenizer(TEXTS[index])["input_ids"]])
        expected = model(input_ids=tokens).last_hidden_state[0].mean(0).detach().numpy()
        np.testing.assert_allclose(vectors[index], expected, atol=1e-5)


def texts_of(ids):
    return [TEXTS[i] for i in ids[:, 0].tolist()]


def test_sentence_transformers_gives_its_own_vectors(encoder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    path, _, _ = encoder
    library.SentenceTransformer(str(path), device="cpu").save(str(tmp_path / "saved"))
    ids = torch.arange(40).view(-1, 1)
    embedder = make_embedder(f"encoder:{tmp_path / 'saved'}", 40, texts_of)
    embedder.fit(ids)
    expected = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(texts_of(ids))
    np.testing.assert_allclose(embedder.embed(ids.numpy().ravel(), ids), expected, atol=1e-5)


def test_static_vectors_are_those_of_model2vec(encoder, tmp_path):
    library = pytest.importorskip("model2vec")
    _, tokenizer, _ = encoder
    table = np.random.default_rng(0).normal(size=(len(tokenizer), 8)).astype(np.float32)
    model = library.StaticModel(vectors=table, tokenizer=tokenizer._tokenizer)
    model.save_pretrained(str(tmp_path / "static"))
    ids = torch.arange(40).view(-1, 1)
    embedder = make_embedder(f"static:{tmp_path / 'static'}", 40, texts_of)
    embedder.fit(ids)
    assert embedder.dimensions == 8
    np.testing.assert_allclose(embedder.embed(ids.numpy().ravel(), ids), model.encode(texts_of(ids)), atol=1e-5)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: np.savez(path.open("wb"), a=np.ones((6, 3))), "got the archive"),
        (lambda path: path.write_text("1 2 3"), r"written by numpy\.save, got"),
        (lambda path: np.save(path.open("wb"), np.array([["a"]] * 6)), "vectors of real numbers"),
        (lambda path: np.save(path.open("wb"), np.ones((6, 0))), r"an array of shape \(6, 0\)"),
        (lambda path: np.save(path.open("wb"), np.ones(6)), r"an array of shape \(6,\)"),
    ],
)
def test_a_file_that_holds_no_vectors_is_refused(tmp_path, save, message):
    save(tmp_path / "v.npy")
    with pytest.raises(ValueError, match=message):
        make_embedder(f"vectors:{tmp_path / 'v.npy'}", 6, None)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "model2vec", None)
    with pytest.raises(ImportError, match=r"pip install 'liveselect\[embed\]'"):
        make_embedder("static:any", 3, lambda ids: [])
