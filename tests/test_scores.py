"""Scores against their definitions, the official programs' loops and scikit-learn; and encoding a
set: order, lost images, processes, kept features."""
import functools

import helpers
import numpy as np
import pytest
import torch

from data import normalise, Preprocess
from pairs import open_pairs
from scores import (bootstrap, classification_scores, embed, encode_images, encode_texts,
                    frozen_features, linear_probe, recall_at_k, retrieval_ranks, top_k,
                    zero_shot_weights)
from tokenizer import BPETokenizer


def coarse(stream, *shape):
    """Small whole numbers: every sum is exact and many scores are equal."""
    return torch.from_numpy(stream.integers(-1, 2, shape)).float()


def official(queries, gallery, right, k):
    """As Chinese-CLIP's and CLIP_benchmark's loops: sort a query's whole gallery, look at the first
    k. right: {query: set of places}; queries that are not in it do not ask."""
    hits = 0
    for q, wanted in right.items():
        scores = (gallery @ queries[q]).nan_to_num(nan=-np.inf).tolist()
        order = sorted(range(len(gallery)), key=lambda g, scores=scores: -scores[g])[:k]
        hits += any(g in wanted and scores[g] > -np.inf for g in order)
    return 100 * hits / len(right)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_recalls_are_those_of_the_official_loops(chunk):
    """Ties, images without text, texts with several images and with none, features of nan."""
    stream = np.random.default_rng(chunk)
    for trial in range(4):
        images, texts = coarse(stream, 23, 3), coarse(stream, 31, 3)
        if trial % 2:
            texts[stream.integers(31)] = torch.nan
        relevant = [(t, int(i)) for t in range(30)
                    for i in stream.permutation(17)[:stream.integers(1, 4)]]
        by_text = {t: {i for u, i in relevant if u == t} for t in range(31)}
        by_image = {i: {t for t, j in relevant if i == j} for i in sorted({i for _, i in relevant})}
        found = recall_at_k(images, texts, torch.tensor(relevant), ks=(1, 3, 10), chunk=chunk)
        for k in (1, 3, 10):
            assert found[f"t2i_r{k}"] == pytest.approx(official(texts, images, by_text, k))
            assert found[f"i2t_r{k}"] == pytest.approx(official(images, texts, by_image, k))
        values = [found[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 3, 10)]
        assert found["rsum"] == pytest.approx(sum(values))
        assert found["mean_recall"] == pytest.approx(sum(values) / 6)
        shuffled = torch.tensor(relevant)[torch.randperm(len(relevant))]
        assert recall_at_k(images, texts, shuffled, ks=(1, 3, 10), chunk=chunk) == found


def test_recalls_of_right_and_of_lost_features():
    owner = [i for i in range(50) for _ in range(5)]
    images = torch.eye(50)
    found = recall_at_k(images, images[owner], torch.tensor(owner))
    assert found["mean_recall"] == 100 and found["rsum"] == 600 and found["t2i_median_rank"] == 1
    assert found == recall_at_k(images, images[owner], torch.tensor(list(enumerate(owner))))
    for n, captions in ((50, 5), (3, 1)):  # a pool of three is no free hit either
        lost = recall_at_k(torch.full((n, 4), torch.nan), torch.ones(n * captions, 4),
                           [i for i in range(n) for _ in range(captions)])
        assert lost["rsum"] == 0
    for wrong in ([0] * 249, [50] * 250, [-1] * 250, [], torch.tensor([[250, 0]])):
        helpers.refused(lambda wrong=wrong: recall_at_k(images, images[owner], wrong), "(N, D)")


def test_the_bootstrap_draws_images_with_their_texts():
    stream = np.random.default_rng(3)
    image, text = coarse(stream, 12, 4), coarse(stream, 20, 4)
    relevant = torch.tensor([(t, t % 10) for t in range(19)])  # text 19 has none; images 10, 11
    ranks = retrieval_ranks(image, text, relevant)
    found, stream = bootstrap(ranks, relevant, 30, seed=5), np.random.RandomState(5)
    units = [([i] if i < 10 else [], [t for t in range(19) if t % 10 == i]) for i in range(12)]
    units.append(([], [19]))
    for d in range(30):
        sample = [units[u] for u in stream.randint(13, size=13)]
        for place, way in enumerate(("i2t", "t2i")):
            asked = ranks[way][[q for unit in sample for q in unit[place]]]
            assert found[f"{way}_r5"][d] == pytest.approx(100 * np.mean(asked < 5))


@pytest.mark.parametrize("k, chunk", [(1, 3), (10, 64), (40, 1024)])
def test_top_k_is_a_stable_sort(k, chunk):
    stream = np.random.default_rng(1)
    queries, gallery = coarse(stream, 25, 4), coarse(stream, 33, 4)
    gallery[5] = torch.nan
    scores, places = top_k(queries, gallery, k, chunk)
    every = (queries @ gallery.T).nan_to_num(nan=-np.inf).sort(dim=1, descending=True, stable=True)
    assert torch.equal(places, every[1][:, :k]) and torch.equal(scores, every[0][:, :k])
    assert top_k(queries[:0], gallery, 3)[1].shape == (0, 3)
    helpers.refused(lambda: top_k(queries, gallery[:0]))


def test_zero_shot_weights_are_the_mean_of_unit_vectors():
    table = {f"{c} {t}": torch.randn(6, dtype=torch.float64) for c in range(5) for t in range(4)}
    groups = [[f"{c} {t}" for t in range(1 + c % 4)] for c in range(5)]

    def encode(texts):
        assert len(texts) <= 3
        return torch.stack([table[text] for text in texts])
    for row, group in zip(zero_shot_weights(encode, groups, chunk=3), groups):
        mean = sum(table[text] / table[text].norm() for text in group)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-12)
    assert torch.allclose(*zero_shot_weights(encode, ["1 1", ["1 1"]]))
    helpers.refused(lambda: zero_shot_weights(encode, [["0 0"], []]), "prompt")


def test_accuracy_and_f1_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    stream = np.random.default_rng(0)
    for _ in range(10):
        labels, predictions = stream.integers(-1, 6, 60), stream.integers(0, 6, 60)
        labels[labels == 4], predictions[predictions == 2] = 5, 4  # 4 never occurs, 2 never said
        scores, seen = classification_scores(predictions, labels.tolist(), 7), labels >= 0
        assert scores["accuracy"] == pytest.approx(100 * (predictions == labels)[seen].mean())
        assert scores["macro_f1"] == pytest.approx(100 * metrics.f1_score(
            labels[seen], predictions[seen], average="macro", labels=np.unique(labels[seen])))
        assert scores["skipped"] == 60 - seen.sum() == 60 - scores["scored"]
        assert scores["per_class"][4] is None and scores["per_class"][2] == 0
        assert scores["confusion"][5, 4] == ((labels == 5) & (predictions == 4)).sum()
    helpers.refused(lambda: classification_scores([0, 1], [-1, -1], 2))


def blobs(per_class, seed, classes=5, width=8):
    """Unit features around a centre for each class, and their labels."""
    stream = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    centres = np.random.default_rng(0).standard_normal((classes, width))
    features = 1.5 + centres[labels] + 1.2 * stream.standard_normal((len(labels), width))
    features = torch.from_numpy(features / np.linalg.norm(features, axis=1)[:, None])
    return features.float(), torch.from_numpy(labels)


def test_the_linear_probe_is_where_its_gradient_vanishes_and_val_chooses_its_strength():
    """C * (softmax - one_hot)^T x + weight = 0, column by column; the bias has no penalty."""
    (features, labels), val, strengths = blobs(6, 3), blobs(30, 4), (0.01, 0.3, 10, 1000)
    lost = torch.cat([features, features[:1] / 0]), torch.cat([labels, torch.tensor([-1])])
    found = [linear_probe(*lost, 5, val, [C]) for C in strengths]
    for weight, bias, C in found:
        excess = (features @ weight.T + bias).softmax(dim=1) - torch.eye(5)[labels]
        assert torch.allclose(C * excess.T @ features, -weight, atol=2e-3 * C ** 0.5)
        assert excess.sum(dim=0).abs().max() < 1e-3
    right = [((val[0] @ weight.T + bias).argmax(dim=1) == val[1]).sum() for weight, bias, _ in found]
    assert len({int(x) for x in right}) > 1
    chosen = linear_probe(features, labels, 5, val, strengths)[2]
    assert chosen == strengths[int(torch.stack(right).argmax())]
    assert 1 < linear_probe(*lost, 5)[2] < 1000  # one that nothing had to choose


# -----------------------------------------------------------------------------
# Encoding a set

@pytest.fixture(scope="module")
def model():
    return helpers.tiny_clip().train()


def test_a_set_is_encoded_in_its_order_whatever_is_lost(run, model, tmp_path):
    """As the model encodes one image, one text at a time; it is left in the mode it was in."""
    folder = helpers.scenes(tmp_path / "pairs", 12, 4)
    pairs = open_pairs(folder, "train").with_transform(Preprocess(32))
    (folder / pairs.paths[3]).write_bytes(b"no image")
    image, labels = encode_images(run, model, pairs.image_items(), batch_size=5, workers=0)
    assert model.training and labels.tolist() == [0, 1, 2, -1, *range(4, 12)]
    assert image[3].isnan().all() and torch.allclose(image[labels >= 0].norm(dim=1), torch.ones(11))
    tokenizer, one = BPETokenizer(), pairs.image_items()[7][0][None]
    with torch.no_grad():
        pixels = normalise(one, model.image_mean, model.image_std)
        alone = model.eval().encode_image(pixels, normalize=True)
        text = model.encode_text(tokenizer(pairs.captions), normalize=True)
    assert torch.allclose(image[7], alone[0], atol=1e-5)
    assert torch.allclose(encode_texts(run, model, tokenizer, pairs.captions), text, atol=1e-5)

    found = embed(run, model, pairs, tokenizer, workers=0)
    kept = [c for c, owner in enumerate(pairs.owner) if owner != 3]
    for ours, theirs in zip(found, (image[labels >= 0], text[kept])):
        assert torch.allclose(ours, theirs, atol=1e-5)
    owners = [pairs.owner[c] - (pairs.owner[c] > 3) for c in kept]
    assert found[2].tolist() == [list(pair) for pair in enumerate(owners)]
    for path in pairs.paths[4:7]:
        (folder / path).write_bytes(b"no image")
    helpers.refused(lambda: embed(run, model, pairs, tokenizer, workers=0), "4 of 12", "images")


def test_kept_features_give_the_same_scores_and_are_found_again(run, model, tmp_path):
    keep = functools.partial(frozen_features, workers=0)
    pairs = open_pairs(helpers.scenes(tmp_path / "pairs", 12, 4), "val").with_transform(
        Preprocess(32))
    kept = keep(run, model, pairs, tmp_path, "digest")
    assert torch.equal(keep(run, None, pairs, tmp_path, "digest"), kept)
    plain, pooled = (embed(run, model, pairs, BPETokenizer(), workers=0, pooled=x)
                     for x in (None, kept))
    assert all(torch.equal(one, other) for one, other in zip(plain, pooled))
    other = pairs.with_transform(Preprocess(32, resize="squash"))
    for changed, tower in ((other, "digest"), (pairs, "other")):
        with pytest.raises(AttributeError):  # not there: it would have to be computed
            keep(run, None, changed, tmp_path, tower)
