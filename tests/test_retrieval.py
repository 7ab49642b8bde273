"""The balanced index against brute force with METHODS, under quantization, and as files: whole, damaged, interrupted."""

import os
import zipfile
from types import SimpleNamespace

import faiss
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from bsap_utils import ROOT
from bsap_utils.datasets import DatasetError
from bsap_utils.normalization import METHODS, pool, shift_and_scale
from bsap_utils.retrieval import BalancedIndex

FOLDED = [name for name in METHODS if name not in ("bsap_h", "tas", "bsap_calibrated", "db_norm")]
IMAGES, TEXTS, TOP = 5_000, 100, 50


def brute_force(method, images, aux, texts, scale, **options):
    """Scores [T, N] as METHODS gives them on the table of all pairs, and all ids [T, N]: best first, ties by lower id."""
    texts, images, aux = texts.double(), images.double(), aux.double()
    expression, candidate = torch.cartesian_prod(torch.arange(len(texts)), torch.arange(len(images))).T
    pairs = SimpleNamespace(expression=expression, candidate=candidate)
    s = (scale * texts @ images.T).ravel()
    scores = METHODS[method](s, scale * images @ aux.T, pairs, **options).reshape(len(texts), -1).float()
    return scores, (-scores).argsort(dim=1, stable=True)


def overlap(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)])


@pytest.fixture(scope="module")
def whole_numbers():
    """Features of small whole numbers: most methods' shifts and scores are exact in float32, and ties are real.

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


@pytest.mark.parametrize("method", ["clip", "subtraction", "dn", "bsap_zscore", "bsap_minmax"])
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


@pytest.mark.parametrize("k", [6, 30, np.int64(120)])
@pytest.mark.parametrize("texts", [1, 40])
def test_of_many_copies_the_first_are_found_though_better_ones_come_later(k, texts):
    """FAISS drops the lowest ids of the worst when a better image comes, and keeps no more than it was asked for."""
    images = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(2000, 1), torch.tensor([[2.0, 0.0]]).repeat(5, 1)])
    balanced = BalancedIndex.build(images, images[:1], 1.0, method="clip")
    scores, ids = balanced.search(torch.tensor([[1.0, 0.0]]).repeat(texts, 1), k)
    assert ids.equal(torch.tensor([*range(2000, 2005), *range(k - 5)]).repeat(texts, 1))
    assert scores[:, :5].eq(2).all() and scores[:, 5:].eq(1).all()


@pytest.fixture(scope="module")
def vectors():
    """Unit vectors of no special numbers, with hubs: a part that all texts share, more of it in some images."""
    generator = torch.Generator().manual_seed(2)

    def unit(rows, common):
        return normalize(torch.randn(rows, 64, generator=generator) + common * torch.ones(64), dim=1)

    return unit(IMAGES, torch.rand(IMAGES, 1, generator=generator)), unit(200, 0.5), unit(TEXTS, 0.5)


@pytest.mark.parametrize("method", FOLDED)
def test_on_any_numbers_it_differs_from_float64_by_less_than_rounding(method, vectors):
    images, aux, texts = vectors
    expected, order = brute_force(method, images, aux, texts, scale=100.0)
    balanced = BalancedIndex.build(images, aux, 100.0, method=method)
    scores, ids = balanced.search(texts, TOP)
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(scores, expected.gather(1, order[:, :TOP]), rtol=1e-6, atol=2e-5)
    assert (ids == order[:, :TOP]).float().mean() > 0.998
    clip = brute_force("clip", images, aux, texts, scale=100.0)[1]
    assert method == "clip" or (ids == clip[:, :TOP]).float().mean() < 0.5, "a correction changes the ranking"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(FOLDED), st.sampled_from([3, 130]))
def test_small_galleries_full_of_copies(seed, k, method, width):
    torch.manual_seed(seed)
    images, aux, texts = (torch.randint(-1, 2, (rows, width)).float() / 2 for rows in (30, 4, 5))
    images[20:] = images[:10]
    expected, _ = brute_force(method, images, aux, texts, scale=4.0)
    scores, ids = BalancedIndex.build(images, aux, 4.0, method=method).search(texts, k)
    assert ids.shape == (5, min(k, 30)) and all(len(set(row)) == len(row) for row in ids.tolist())
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, expected.sort(1, descending=True).values[:, :k], rtol=1e-5, atol=1e-5)
    same = scores[:, 1:] == scores[:, :-1]
    assert (ids[:, 1:] > ids[:, :-1])[same].all()


@pytest.mark.parametrize(
    ("method", "options"),
    [("bsap", {"temperature": 7.0}), ("nnn", {"k": 3, "weight": 1.0}), ("dn", {"weight": 0.9}),
     ("sinkhorn", {"temperature": 3.0, "iterations": 2})],
)  # fmt: skip
def test_options_reach_the_method(vectors, method, options):
    images, aux, texts = vectors[0][:3000], *vectors[1:]
    order = brute_force(method, images, aux, texts, 100.0, **options)[1]
    ids = BalancedIndex.build(images, aux, 100.0, method=method, **options).search(texts, 5)[1]
    assert (ids == order[:, :5]).float().mean() > 0.99
    usual = BalancedIndex.build(images, aux, 100.0, method=method).search(texts, 5)[1]
    assert (ids == usual).float().mean() < 0.99


def test_methods_that_need_more_than_the_bank_take_it_as_options(vectors, tmp_path):
    images, aux, texts = vectors[0][:2000], *vectors[1:]
    unlabelled = (100 * images @ texts[50:].T).mean(1)
    more = {"bsap_calibrated": {"mean_logit": unlabelled, "image": torch.zeros(2000, dtype=torch.long)},
            "db_norm": {"image_logits": 100 * images @ vectors[0][3000:3100].T}}  # fmt: skip
    for method, options in more.items():
        balanced = BalancedIndex.build(images, aux, 100.0, method, **options)
        order = brute_force(method, images, aux, texts[:50], 100.0, **options)[1]
        assert (balanced.search(texts[:50], 10)[1] == order[:, :10]).float().mean() > 0.998
        balanced.save(tmp_path / method)
        assert BalancedIndex.load(tmp_path / method).search(texts, 10)[1].equal(balanced.search(texts, 10)[1])


@pytest.mark.parametrize("method", ["sinkhorn", "bsap_calibrated", "db_norm"])
def test_what_depends_on_the_whole_gallery_cannot_grow(vectors, method):
    images, aux, _ = (part[:50] for part in vectors)
    options = {
        "sinkhorn": {},
        "bsap_calibrated": {"mean_logit": images[:, 0], "image": torch.zeros(50, dtype=torch.long)},
        "db_norm": {"image_logits": images},
    }
    balanced = BalancedIndex.build(images, aux, 100.0, method, **options[method])
    with pytest.raises(ValueError, match=f"{method} depends on the whole gallery.*anew"):
        balanced.add(images)


# other factories


def thorough(index):
    """Let FAISS look everywhere: what its shortcuts miss is no matter of the extra coordinate's precision."""
    if inverted := faiss.try_extract_index_ivf(index):
        inverted.nprobe = inverted.nlist
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = 4000


@pytest.mark.parametrize(
    ("factory", "method"),
    [(factory, method) for factory in ("HNSW32", "SQ8", "PQ16x6np", "IVF32,SQ8") for method in ("bsap", "csls")]
    + [("IVF32,SQ8", "bsap_zscore")],  # f / scale is far from the unit length that FAISS's cells have
)
def test_the_extra_coordinate_costs_under_one_percent(vectors, factory, method):
    """Recall@10 against that of the same compression of f alone, with the bias in full precision."""
    images, aux, texts = vectors[0][:3000], *vectors[1:]
    expected, order = brute_force(method, images, aux, texts, 100.0)
    plain = faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT)
    plain.train(images.numpy())
    plain.add(images.numpy())
    if inverted := faiss.try_extract_index_ivf(plain):
        inverted.make_direct_map()
    compressed = torch.from_numpy(plain.reconstruct_n(0, len(images)))
    shift, scale = shift_and_scale(100 * images @ aux.T, method)
    kept = overlap((100 * texts @ compressed.T - shift).div(scale).topk(10).indices, order[:, :10])
    balanced = BalancedIndex.build(images, aux, 100.0, method=method, factory=factory)
    thorough(balanced.index)
    scores, ids = balanced.search(texts, 10)
    assert overlap(ids, order[:, :10]) >= (0.94 if "x6" in factory else 0.985) * kept  # 6 bits: 64 levels of bias
    assert (scores - expected.gather(1, ids)).abs().median() < 0.4 * expected.std()


def test_adding_later_is_building_at_once(vectors):
    images, aux, texts = (part.numpy() for part in vectors)
    grown = BalancedIndex.build(images[:0], aux, 100.0)
    for part in (images[:100], images[100:3000], images[3000:3000], images[3000:]):
        grown.add(part)
    whole = BalancedIndex.build(images, aux, 100.0)
    assert grown.index.ntotal == whole.index.ntotal == IMAGES
    torch.testing.assert_close(grown.search(texts, 7)[0], whole.search(texts, 7)[0])
    assert (grown.search(texts, 7)[1] == whole.search(texts, 7)[1]).float().mean() > 0.998


def test_what_does_not_fit_is_refused_and_named(vectors):
    images, aux, texts = (part[:50] for part in vectors)
    broken, infinite = images.clone(), texts.clone()
    broken[3, 1], infinite[3, 1] = torch.nan, torch.inf
    balanced = BalancedIndex.build(images, aux, 100.0)
    for call, words in [
        (lambda: BalancedIndex.build(images[:, :60], aux, 100.0), r"image_features \[50, 60\].*64"),
        (lambda: BalancedIndex.build(images[0], aux, 100.0), r"image_features \[64\]"),
        (lambda: BalancedIndex.build(broken, aux, 100.0), "image_features.*NaN"),
        (lambda: BalancedIndex.build(images, broken, 100.0), "aux_features.*NaN"),
        (lambda: BalancedIndex.build(images, aux, 100.0, method="softmax"), "'softmax'.*bsap"),
        (lambda: BalancedIndex.build(images, aux, 100.0, temperature=0.0), "temperature is 0"),
        (lambda: BalancedIndex.build(images, aux, float("nan")), "logit_scale.*NaN"),
        (lambda: BalancedIndex.build(images, aux, float("inf")), "logit_scale.*NaN"),
        (lambda: balanced.search(texts[:, :3], 5), r"text_features \[50, 3\].*64"),
        (lambda: balanced.search(broken, 5), "text_features.*NaN"),
        (lambda: balanced.search(infinite, 5), "text_features.*NaN or inf"),
        (lambda: balanced.search(texts, 0), "k is 0"),
        (lambda: BalancedIndex.build(images[:0], aux, 100.0).search(texts, 1), "of 0 images"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert balanced.search(texts[:0], 5)[1].shape == (0, 5) and balanced.search(texts.half(), np.uint8(5))[1].shape == (
        50,
        5,
    )


@pytest.mark.parametrize("factory", ["L2norm,Flat", "PCA16,Flat", "PCAR24,Flat", "RR32,Flat", "ITQ32,LSH", "OPQ8,PQ8"])
def test_factories_that_change_the_ranking_are_refused(vectors, factory):
    with pytest.raises(ValueError, match=f"{factory}.*changes ranks"):
        BalancedIndex.build(vectors[0][:50], vectors[1], 100.0, factory=factory)


# files


@pytest.mark.parametrize("method", ["bsap", "bsap_minmax"])
@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,SQ8"])
def test_a_saved_index_answers_as_before_and_can_grow(vectors, tmp_path, method, factory):
    images, aux, texts = (part[:300] for part in vectors)
    balanced = BalancedIndex.build(images, aux, 100.0, method=method, factory=factory)
    balanced.save(tmp_path / "new" / "gallery.index")
    loaded = BalancedIndex.load(tmp_path / "new" / "gallery.index")
    assert loaded.settings == balanced.settings and [file.name for file in (tmp_path / "new").iterdir()] == [
        "gallery.index"
    ]
    for a, b in zip(balanced.search(texts, 9), loaded.search(texts, 9), strict=True):
        assert a.equal(b)
    for index in (balanced, loaded):
        index.add(vectors[0][300:400])
    assert loaded.index.ntotal == 400
    if factory != "HNSW16":  # it draws anew after loading
        assert loaded.search(texts, 9)[1].equal(balanced.search(texts, 9)[1])


@pytest.fixture
def saved(vectors, tmp_path):
    BalancedIndex.build(vectors[0][:50], vectors[1], 100.0).save(tmp_path / "gallery.index")
    return tmp_path / "gallery.index"


@pytest.mark.parametrize("how", ["empty", "cut", "text", "bit", "gone", "another archive", "pickle that calls"])
def test_a_damaged_file_is_reported_with_its_name_and_a_remedy(saved, how):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        saved.unlink()
    elif how == "another archive":
        with zipfile.ZipFile(saved, "w") as archive:
            archive.writestr("a.txt", "nothing")
    elif how == "pickle that calls":
        torch.save({"index": SimpleNamespace}, saved)
    else:
        saved.write_bytes({"empty": b"", "cut": bytes(content[:500]), "text": b"{}", "bit": bytes(content)}[how])
    with pytest.raises(DatasetError, match="(?s)gallery.index cannot be read.*anew"):
        BalancedIndex.load(saved)


def test_an_interrupted_save_leaves_the_last_index_and_names_carry_the_process(saved, vectors, monkeypatch):
    images, aux, texts = vectors
    before = BalancedIndex.load(saved).search(texts, 5)[1]
    other = BalancedIndex.build(images[50:100], aux, 100.0, method="csls")
    names = []

    def killed(content, part):
        names.append(part.name)
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("bsap_utils.retrieval.torch.save", killed)
        other.save(saved)
    assert str(os.getpid()) in names[0]
    assert BalancedIndex.load(saved).search(texts, 5)[1].equal(before)
    other.save(saved)
    assert BalancedIndex.load(saved).search(texts, 5)[1].equal(other.search(texts, 5)[1])
    assert [file.name for file in saved.parent.iterdir()] == ["gallery.index"], "what the interrupted save left is gone"


def test_an_index_is_a_plain_one_with_one_more_coordinate(vectors):
    """The identity that the notebook shows, by hand."""
    images, aux, texts = (part[:300] for part in vectors)
    bias = pool(100 * images @ aux.T, 1.0).float()
    plain = faiss.IndexFlatIP(65)
    plain.add(torch.cat([images, -bias[:, None]], 1).numpy())
    _, by_hand = plain.search(torch.cat([100 * texts, torch.ones(len(texts), 1)], 1).numpy(), 5)
    assert (BalancedIndex.build(images, aux, 100.0).search(texts, 5)[1].numpy() == by_hand).mean() > 0.99


def test_hits_and_r_precision_of_notebook_06_are_counted_by_hand():
    generator = np.random.default_rng(6)
    scores, relevant = generator.integers(0, 6, (20, 30)).astype(float), generator.random((20, 30)) < 0.2
    relevant[0] = True
    cells = nbformat.read(ROOT / "notebooks/06_retrieval.ipynb", as_version=4).cells
    names = {"torch": torch, "relevant": torch.tensor(relevant)}
    exec(next(cell.source for cell in cells if cell.source.startswith("def hits_of")), names)
    hits = names["hits_of"](torch.tensor(scores))
    precision = names["r_precision"](hits)
    for t in range(30):
        order = sorted(range(20), key=lambda row: (-scores[row, t], row))  # of equal scores the lower row first
        assert hits[:, t].tolist() == [bool(relevant[row, t]) for row in order]
        count = int(relevant[:, t].sum())
        assert precision[t] == pytest.approx(sum(relevant[row, t] for row in order[:count]) / count)
    with pytest.raises(ValueError, match="NaN"):
        names["hits_of"](torch.tensor(scores) * torch.nan)
