"""The balanced index against brute force with METHODS, under quantization, and as files: whole, damaged, interrupted."""

import json
import re

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from bsap_utils import retrieval
from bsap_utils.evaluation import retrieval_ranks, retrieval_table
from bsap_utils.normalization import METHODS, bsap, bsap_hybrid, default_options, shift_and_scale_from_features
from bsap_utils.retrieval import BalancedIndex, IndexFileError

FOLDED = [name for name in METHODS if name != "bsap_h"]
IMAGES, TEXTS, TOP = 10_000, 200, 50


def brute_force(method, images, aux, texts, scale, **options):
    """Scores [T, N] as METHODS gives them, and all ids [T, N]: best first, of equal scores the lower id first."""
    query, prompts = scale * images @ texts.T, scale * images @ aux.T
    scores = METHODS[method](query, prompts, torch.zeros(len(images), dtype=torch.long), **options).T
    return scores, (-scores).argsort(dim=1, stable=True)


@pytest.fixture(scope="module")
def whole_numbers():
    """Features of small whole numbers, made so that every method's shift and score is exact in float32: ties are real.

    The auxiliary logits of an image are half f1 + f2 and half f1 − f2, so its mean is f1, its range 2 |f2| and its standard
    deviation |f2|, a power of two. Every tenth image is a copy of an earlier one.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(-3, 4, (IMAGES, 32), generator=generator).float()
    images[:, 0] = torch.randint(-8, 9, (IMAGES,), generator=generator)
    images[:, 1] = 2.0 ** torch.randint(0, 4, (IMAGES,), generator=generator)
    images[9::10] = images[0::10]
    aux = torch.zeros(32, 32)
    aux[:, 0], aux[:16, 1], aux[16:, 1] = 1, 1, -1
    texts = torch.randint(-3, 4, (TEXTS, 32), generator=generator).float()
    texts[0] = 0  # asks nothing: all images are equal for CLIP
    return images, aux, texts


@pytest.mark.parametrize("method", FOLDED)
def test_a_flat_index_ranks_exactly_as_brute_force_ties_included(method, whole_numbers):
    images, aux, texts = whole_numbers
    expected, order = brute_force(method, images, aux, texts, scale=2.0)
    balanced = BalancedIndex.build(images, aux, 2.0, method=method)
    for k in (1, 10, TOP):  # FAISS has other ways for few texts and for k from 100 on, and ties of its own choice
        scores, ids = balanced.search(texts, k)
        assert ids.equal(order[:, :k])
        assert scores.equal(expected.gather(1, ids))
        assert balanced.search(texts[:3], k)[1].equal(order[:3, :k])
    assert (scores[:, 1:] == scores[:, :-1]).float().mean() > 0.05, "there are ties"


@pytest.mark.parametrize("k", [6, 8, 30, 120])
@pytest.mark.parametrize("texts", [1, 40])
def test_of_many_copies_the_first_are_found_though_better_ones_come_later(k, texts):
    """FAISS drops the lowest ids of the worst when a better image comes, and keeps no more than it was asked for."""
    images = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(2000, 1), torch.tensor([[2.0, 0.0]]).repeat(5, 1)])
    scores, ids = BalancedIndex.build(images, images[:1], 1.0, method="clip").search(
        torch.eye(2)[:1].repeat(texts, 1), k
    )
    assert ids.equal(torch.tensor([*range(2000, 2005), *range(k - 5)]).repeat(texts, 1))
    assert scores[:, :5].eq(2).all() and scores[:, 5:].eq(1).all()


@pytest.fixture(scope="module")
def vectors():
    """Unit vectors of no special numbers, with hubs: a part that all texts share, more of it in some images."""
    generator = torch.Generator().manual_seed(2)

    def unit(rows, common):
        return normalize(torch.randn(rows, 64, generator=generator) + common * torch.ones(64), dim=1)

    return unit(IMAGES, torch.rand(IMAGES, 1, generator=generator)), unit(100, 0.5), unit(TEXTS, 0.5)


@pytest.mark.parametrize("method", FOLDED)
def test_on_any_numbers_it_differs_from_float64_by_less_than_rounding(method, vectors):
    images, aux, texts = (part.double() for part in vectors)
    expected, order = brute_force(method, images, aux, texts, scale=100.0)
    balanced = BalancedIndex.build(*vectors[:2], 100.0, method=method)
    scores, ids = balanced.search(vectors[2], TOP)
    stored = torch.from_numpy(balanced.index.reconstruct_n(0, IMAGES)).double()
    of_stored = torch.cat([100 * texts, torch.ones(TEXTS, 1)], 1) @ stored.T
    assert scores.equal(of_stored.gather(1, ids).float()), "the vectors stored are searched in float64"
    assert ids.equal((-of_stored.float()).argsort(dim=1, stable=True)[:, :TOP])
    best = expected.gather(1, order[:, :TOP])
    assert (expected.gather(1, ids) - best).abs().max() < 1e-6 * 100
    torch.testing.assert_close(scores.double(), best, rtol=1e-6, atol=1e-4)
    assert (ids == order[:, :TOP]).float().mean() > 0.995
    clip = brute_force("clip", images, aux, texts, scale=100.0)[1]
    assert method == "clip" or (ids == clip[:, :TOP]).float().mean() < 0.5, "a correction changes the ranking"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 40), method=st.sampled_from(FOLDED))
def test_small_galleries_full_of_copies(seed, k, method):
    torch.manual_seed(seed)
    images = torch.randint(-1, 2, (30, 3)).float() / 2
    aux, texts = torch.randint(-1, 2, (4, 3)).float() / 2, torch.randint(-1, 2, (5, 3)).float() / 2
    expected, _ = brute_force(method, images, aux, texts, scale=4.0)
    scores, ids = BalancedIndex.build(images, aux, 4.0, method=method).search(texts, k)
    assert ids.shape == (5, min(k, 30)) and all(len(set(row)) == len(row) for row in ids.tolist())
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, expected.sort(1, descending=True).values[:, :k], rtol=1e-5, atol=1e-5)
    same = scores[:, 1:] == scores[:, :-1]
    assert (ids[:, 1:] > ids[:, :-1])[same].all()


def test_options_reach_the_method(vectors):
    images, aux, texts = vectors
    for method, options in [("bsap", {"temperature": 7.0}), ("nnn", {"k": 3, "weight": 1.0}), ("dn", {"weight": 0.9}),
                            ("qb_norm", {"temperature": 2.0})]:  # fmt: skip
        expected, order = brute_force(method, images, aux, texts, 100.0, **options)
        ids = BalancedIndex.build(images, aux, 100.0, method=method, **options).search(texts, 5)[1]
        assert (ids == order[:, :5]).float().mean() > 0.99
        usual = BalancedIndex.build(images, aux, 100.0, method=method).search(texts, 5)[1]
        assert (ids == usual).float().mean() < 0.99


def test_probabilities_are_those_of_bsap(vectors):
    images, aux, texts = vectors
    value = bsap(100 * images @ texts.T, 100 * images @ aux.T, 5.0).T
    balanced = BalancedIndex.build(images, aux, 100.0, temperature=5.0)
    probability, ids = balanced.search(texts, TOP, probability=True)
    assert ids.equal(balanced.search(texts, TOP)[1])
    torch.testing.assert_close(probability, value.gather(1, ids), rtol=1e-4, atol=1e-6)
    assert ((probability > 0) & (probability < 1)).all()
    with pytest.raises(ValueError, match="nnn are no probabilities"):
        BalancedIndex.build(images, aux, 100.0, method="nnn").search(texts, 1, probability=True)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_the_hybrid_is_exact_where_its_candidates_are_the_whole_gallery(vectors, factory):
    images, aux, texts = vectors[0][:90], vectors[1], vectors[2][:20]
    group = torch.zeros(90, dtype=torch.long)
    query, prompts = 10 * images @ texts.T, 10 * images @ aux.T
    options = {"weight": 0.7, "temperature": 2.0}
    expected = METHODS["bsap_h"](query, prompts, group, **options).T
    balanced = BalancedIndex.build(images, aux, 10.0, method="bsap_h", factory=factory, **options)
    thorough(balanced.index)
    scores, ids = balanced.search(texts, 10)
    assert ids.equal(expected.argsort(1, descending=True)[:, :10])
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=1e-4, atol=1e-4)
    value = bsap_hybrid(query, prompts, group, **options).T.gather(1, ids)
    torch.testing.assert_close(balanced.search(texts, 10, probability=True)[0], value, rtol=1e-4, atol=1e-6)


def test_the_hybrid_of_a_large_gallery_finds_nearly_the_same(vectors):
    images, aux, texts = vectors
    order = brute_force("bsap_h", images, aux, texts, 100.0)[1][:, :10]
    ids = BalancedIndex.build(images, aux, 100.0, method="bsap_h").search(texts, 10)[1]
    assert overlap(ids, order) > 0.95
    order = brute_force("clip", images, aux, texts, 100.0)[1][:, :10]
    ids = BalancedIndex.build(images, aux, 100.0, method="bsap_h", weight=1.0).search(texts, 10)[1]
    assert overlap(ids, order) > 0.999, "weight 1 is CLIP, whose best BSAP may not find"


# other factories


def thorough(index):
    """Let FAISS look everywhere: what its shortcuts miss is no matter of the extra coordinate's precision."""
    if inverted := faiss.try_extract_index_ivf(index):
        inverted.nprobe = inverted.nlist
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = 4000


def overlap(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)])


@pytest.mark.parametrize(
    ("factory", "method"),
    [(factory, method) for factory in ("HNSW32", "SQ8", "PQ16x6np", "IVF32,SQ8") for method in ("bsap", "nnn")]
    + [("IVF32,SQ8", "bsap_zscore")],  # f / scale is far from the unit length that FAISS's cells have
)
def test_the_extra_coordinate_costs_under_one_percent(vectors, factory, method):
    """Recall@10 against that of the same compression of f alone, with the bias in full precision."""
    images, aux, texts = vectors[0][:4000], *vectors[1:]
    truth = brute_force(method, images, aux, texts, 100.0)[1][:, :10]
    plain = faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT)
    plain.train(images.numpy())
    plain.add(images.numpy())
    if inverted := faiss.try_extract_index_ivf(plain):
        inverted.make_direct_map()
    compressed = torch.from_numpy(plain.reconstruct_n(0, len(images)))
    shift, scale = shift_and_scale_from_features(images, aux, 100.0, method)
    kept = overlap((100 * texts @ compressed.T - shift).div(scale).topk(10).indices, truth)
    balanced = BalancedIndex.build(images, aux, 100.0, method=method, factory=factory)
    thorough(balanced.index)
    assert overlap(balanced.search(texts, 10)[1], truth) >= 0.99 * kept


def test_scores_of_a_centred_and_scaled_bias_are_the_methods_own(vectors):
    images, aux, texts = vectors
    balanced = BalancedIndex.build(images, aux, 100.0, factory="HNSW32")
    assert balanced.offset > 1 and balanced.unit > 1
    scores, ids = balanced.search(texts, 10)
    expected = brute_force("bsap", images, aux, texts, 100.0)[0]
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=1e-4, atol=1e-3)


def test_adding_later_is_building_at_once(vectors):
    images, aux, texts = (part.numpy() for part in vectors)
    grown = BalancedIndex.build(images[:100], aux, 100.0)
    for part in (images[100:5000], images[5000:5000], images[5000:]):
        grown.add(part)
    whole = BalancedIndex.build(images, aux, 100.0)
    assert len(grown) == len(whole) == IMAGES
    for a, b in zip(grown.search(texts, 7), whole.search(texts, 7), strict=True):
        assert a.equal(b)


def test_what_does_not_fit_is_refused_and_named(vectors):
    images, aux, texts = (part[:50] for part in vectors)
    broken = images.clone()
    broken[3, 1] = torch.nan
    balanced = BalancedIndex.build(images, aux, 100.0)
    for call, said in [
        (lambda: BalancedIndex.build(images[:, :60], aux, 100.0), r"image_features \[50, 60\].*64"),
        (lambda: BalancedIndex.build(images[0], aux, 100.0), r"image_features \[64\]"),
        (lambda: BalancedIndex.build(broken, aux, 100.0), "NaN"),
        (lambda: BalancedIndex.build(broken, aux, 100.0, method="clip"), "NaN"),
        (lambda: BalancedIndex.build(images, aux, 100.0, method="softmax"), "'softmax'.*bsap"),
        (lambda: BalancedIndex.build(images, aux, 100.0, method="nnn", temperature=2.0), "nnn has no temperature.*k, weight"),
        (lambda: BalancedIndex.build(images, aux, 100.0, temperature=0.0), "temperature is 0"),
        (lambda: BalancedIndex.build(images, aux, 100.0, factory="PQ7"), "64 dimensions cannot be cut into 7"),
        (lambda: BalancedIndex.build(images[:0], aux, 100.0, factory="SQ8"), "no image"),
        (lambda: balanced.search(texts[:, :3], 5), r"text_features \[50, 3\].*64"),
        (lambda: balanced.search(texts, 0), "k is 0"),
        (lambda: BalancedIndex.build(images[:0], aux, 100.0).search(texts, 1), "of 0 images"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()


# files


@pytest.mark.parametrize("method", ["bsap", "bsap_h", "bsap_minmax"])
@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_a_saved_index_answers_as_before_and_can_grow(vectors, tmp_path, method, factory):
    images, aux, texts = (part[:300] for part in vectors)
    balanced = BalancedIndex.build(images, aux, 100.0, method=method, factory=factory)
    balanced.save(tmp_path / "new" / "gallery.json")
    given = {"aux_features": aux.numpy() + 1e-6, "logit_scale": 100, "method": method, **default_options(method)}
    loaded = BalancedIndex.load(tmp_path / "new" / "gallery.json", **given)
    for first in (True, False) if factory == "Flat" else (True,):  # HNSW draws anew after loading
        for a, b in zip(balanced.search(texts, 9), loaded.search(texts, 9), strict=True):
            assert a.equal(b)
        if first:
            for index in (balanced, loaded):
                index.add(vectors[0][300:400])
    assert len(loaded) == len(balanced)


@pytest.fixture
def saved(vectors, tmp_path):
    BalancedIndex.build(vectors[0][:50], vectors[1], 100.0).save(tmp_path / "gallery.json")
    return tmp_path / "gallery.json"


def test_an_index_of_other_settings_is_refused(saved, vectors):
    for other in ({"method": "nnn"}, {"temperature": 2.0}, {"logit_scale": 20.0}, {"weight": 1.0}, {"factory": "HNSW32"},
                  {"aux_features": vectors[1][:9]}, {"aux_features": vectors[1].flip(0)}):  # fmt: skip
        with pytest.raises(IndexFileError, match=f"gallery.json was built from another {next(iter(other))}.*build"):
            BalancedIndex.load(saved, **other)


def test_what_is_written_says_what_it_is(saved):
    written = json.loads(saved.read_text())
    assert (written["method"], written["temperature"], written["logit_scale"]) == ("bsap", 1.0, 100.0)
    assert (written["dimension"], written["count"]) == (64, 50) and written["versions"]["faiss"] == faiss.__version__
    assert re.fullmatch(r"gallery-[0-9a-f]{12}\.faiss", written["file"])
    assert {file.name for file in saved.parent.iterdir()} == {"gallery.json", written["file"]}


def damaged(text, **changes):
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "how", ["empty", "cut", "array", "no method", "other bank", "escape", "bit", "short", "gone", "no json"]
)
def test_a_damaged_file_is_reported_with_its_name_and_a_remedy(saved, how):
    text = saved.read_text()
    file = saved.with_name(json.loads(text)["file"])
    if how in ("bit", "short", "gone"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.unlink() if how == "gone" else file.write_bytes(content if how == "bit" else content[:100])
        named = file.name
    else:
        bank = json.loads(text)["aux_features"]
        saved.write_text({
            "empty": "", "cut": text[:200], "array": "[]", "no method": text.replace('"method"', '"way"'), "no json": "",
            "other bank": damaged(text, aux_features="AAAA" + bank[4:]), "escape": damaged(text, file="../x.faiss"),
        }[how])  # fmt: skip
        named = saved.name
    if how == "no json":
        saved.unlink()
    with pytest.raises(IndexFileError, match=re.escape(named) + r".*(damaged|missing).*build it anew"):
        BalancedIndex.load(saved)


@pytest.mark.parametrize("moment", ["write_index", "index file", "settings"])
def test_an_interrupted_save_leaves_the_last_index(saved, vectors, moment, monkeypatch):
    images, aux, texts = vectors
    before = BalancedIndex.load(saved).search(texts, 5)[1]
    other = BalancedIndex.build(images[50:100], aux, 100.0, method="nnn")

    class Killed(BaseException):
        pass

    def kill(*args, **options):
        raise Killed

    if moment == "write_index":
        monkeypatch.setattr(retrieval.faiss, "write_index", kill)
    elif moment == "index file":  # after it has its name
        monkeypatch.setattr(retrieval.json, "dumps", kill)
    else:
        rename = retrieval.Path.replace
        monkeypatch.setattr(retrieval.Path, "replace", lambda a, b: kill() if b.suffix == ".json" else rename(a, b))
    with pytest.raises(Killed):
        other.save(saved)
    monkeypatch.undo()
    assert BalancedIndex.load(saved, method="bsap").search(texts, 5)[1].equal(before)
    other.save(saved)
    assert BalancedIndex.load(saved, method="nnn").search(texts, 5)[1].equal(other.search(texts, 5)[1])
    assert len(list(saved.parent.iterdir())) == 2, "what the interrupted save left is gone"


def test_files_of_other_indexes_stay(saved, vectors):
    BalancedIndex.build(vectors[0][:9], vectors[1], 100.0).save(saved.with_name("gallery-2.json"))
    BalancedIndex.build(vectors[0][:8], vectors[1], 100.0).save(saved)
    assert len(BalancedIndex.load(saved)) == 8 and len(BalancedIndex.load(saved.with_name("gallery-2.json"))) == 9


# ranks and their table


def test_ranks_are_those_of_a_loop():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 4, (30, 25)).astype(np.float32)
    relevant = generator.random((30, 25)) < 0.1
    relevant[3, relevant.sum(0) == 0] = True
    expected = []
    for column, right in zip(scores.T, relevant.T, strict=True):
        order = sorted(range(30), key=lambda row: (-column[row], row))
        expected.append(1 + next(place for place, row in enumerate(order) if right[row]))
    got = retrieval_ranks(torch.tensor(scores), torch.tensor(relevant))
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="1 of 25 texts"):
        relevant[:, 7] = False
        retrieval_ranks(torch.tensor(scores), torch.tensor(relevant))


def test_the_table_counts_ranks_and_its_intervals_are_those_of_a_plain_bootstrap():
    generator = np.random.default_rng(3)
    images = np.repeat(np.arange(40), generator.integers(1, 6, 40))
    clip = np.ceil(np.exp(generator.normal(1.5, 1.2, len(images))) * (1 + images % 3)).astype(int)
    table = retrieval_table({"clip": clip, "bsap": np.maximum(clip - 1, 1)}, images, seed=1).set_index("method")
    for k in (1, 5, 10):
        assert table.loc["clip", f"recall_{k}"] == round(100 * np.mean(clip <= k), 2)
    assert table.loc["bsap", "delta_10"] == round(100 * (np.mean(clip <= 11) - np.mean(clip <= 10)), 2)
    assert table.loc["clip", "median_rank"] == np.median(clip)
    drawn = [
        np.median(np.concatenate([clip[images == one] for one in generator.integers(0, 40, 40)])) for _ in range(3000)
    ]
    bounds = table.loc["clip", ["median_low", "median_high"]].to_numpy(float)
    np.testing.assert_allclose(bounds, np.quantile(drawn, [0.025, 0.975]), atol=1)
    assert bounds[0] < np.median(clip) < bounds[1]
