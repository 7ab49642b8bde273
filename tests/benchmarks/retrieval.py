"""Measure the balanced index: `python tests/benchmarks/retrieval.py` prints and writes results/retrieval.json.

Three questions, on the sample's regions and on synthetic vectors like them. (1) Against `nnn-retrieval` (extra `bench`) on the
same features: is the fit of our biases as fast as its own, is the ranking the same where the settings are? Its scores are
cos − weight · mean of the k nearest cosines, ours the same times the logit scale: the weight is the same number. (2) Against
FAISS's plain flat index: what do search and memory cost? (3) How much of a flat ranking do compressed indexes keep, with the
extra coordinate and without: what does its place and its size matter?

All that is compared runs in turn in each round; times are those of the CPU, and ratios the medians of the rounds' ratios, so that
a busy machine says the same as an idle one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import nnn
import numpy as np
import torch
from torch.nn.functional import normalize

from bsap_utils import ROOT
from bsap_utils.aux_prompts import auxiliary_prompts
from bsap_utils.datasets import load_refer
from bsap_utils.normalization import shift_and_scale_from_features
from bsap_utils.proposals import ground_truth
from bsap_utils.retrieval import BalancedIndex, synthetic_features
from bsap_utils.scoring import SAMPLE_MODEL, TEMPLATE, ClipScorer

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
TOP = 10
NNN = {"k": 16, "weight": 0.75}
COUNT = int(os.environ.get("VECTORS", 20_000))  # of the compressed indexes
PROBES, BEAM = 16, 128


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds (of all threads) of each call in each of `rounds` rounds, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counts in [False] + [True] * rounds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            if counts:
                times[name].append(time.process_time() - start)
    return times


def compared(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Return CPU milliseconds (median) and the median ratio to `baseline` in the same round."""
    return {name: {"cpu_ms": round(1000 * statistics.median(values), 3),
                   "ratio": round(statistics.median(a / b for a, b in zip(values, times[baseline], strict=True)), 3)}
            for name, values in times.items()}  # fmt: skip


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return features of all annotated regions, of the bank `attributes`, of distinct val descriptions, and the scale."""
    os.chdir(ROOT)
    ds = load_refer("data/refshapes", "refshapes")
    scorer = ClipScorer(SAMPLE_MODEL, device="cpu")
    images = scorer.encode_regions(ds, ground_truth(ds), ("crop",))[0]
    texts = sorted(set(ds.select("val").expressions["text"].str.lower()))
    encode = [
        scorer.encode_texts([TEMPLATE.format(t) for t in part]) for part in (auxiliary_prompts("attributes", ds), texts)
    ]
    return images, *encode, scorer.logit_scale


def peer(images: torch.Tensor, aux: torch.Tensor) -> nnn.NNNRanker:
    """Return nnn-retrieval's ranker; building it is its fit. (Its FAISS retriever fails with faiss 1.15: an attribute.)"""
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        of = nnn.NNNRetriever(images.shape[1])
        return nnn.NNNRanker(of, images.numpy(), aux.numpy(), alternate_ks=NNN["k"], alternate_weight=NNN["weight"])


def against_peer(images: torch.Tensor, aux: torch.Tensor, texts: torch.Tensor, scale: float) -> dict:
    """Compare fit and ranking with nnn-retrieval."""
    fits: dict[str, Callable[[], object]] = {
        "nnn-retrieval": lambda: peer(images, aux),
        "our NNN": lambda: shift_and_scale_from_features(images, aux, scale, "nnn", **NNN),
        "our BSAP": lambda: shift_and_scale_from_features(images, aux, scale, "bsap"),
        "our BalancedIndex, NNN": lambda: BalancedIndex.build(images, aux, scale, method="nnn", **NNN),
    }
    with contextlib.redirect_stderr(io.StringIO()):
        scores, ids = peer(images, aux).search(texts.numpy(), TOP)
    own_scores, own_ids = BalancedIndex.build(images, aux, scale, method="nnn", **NNN).search(texts, TOP)
    ranking = {
        "places_with_the_same_image": round(float((own_ids.numpy() == ids).mean()), 6),
        "largest_difference_of_scores": float(np.abs(own_scores.numpy() / scale - scores).max()),
    }
    shape = {"images": len(images), "dimension": images.shape[1], "prompts": len(aux)}
    return {**shape, "fit": compared(in_turn(fits, 5), "nnn-retrieval"), "same_ranking": ranking}


def against_plain(images: torch.Tensor, aux: torch.Tensor, texts: torch.Tensor, scale: float) -> dict:
    """Compare search and memory with a plain flat index."""
    plain = faiss.IndexFlatIP(images.shape[1])
    plain.add(images.numpy())
    balanced = BalancedIndex.build(images, aux, scale)
    found = {}
    for name, part in (("64 texts at once", texts[:64].contiguous()), ("one text", texts[:1].contiguous())):
        calls: dict[str, Callable[[], object]] = {
            "plain": lambda p=part: plain.search(p.numpy(), TOP),  # type: ignore[misc]
            "balanced": lambda p=part: balanced.search(p, TOP),  # type: ignore[misc]
        }
        found[name] = compared(in_turn(calls, 7 if len(images) > 10**5 else 25), "plain")
    size = {
        name: index.ntotal * index.sa_code_size() for name, index in (("plain", plain), ("balanced", balanced.index))
    }
    return {"vectors": len(images), "dimension": images.shape[1], "bytes": size, **found}


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def look(index: faiss.Index) -> faiss.Index:
    """Set how far a search goes, the same for all."""
    if inverted := faiss.try_extract_index_ivf(index):
        inverted.nprobe = PROBES
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = BEAM
    if isinstance(index, faiss.IndexRefineFlat):
        index.k_factor = 10
    return index


def compressed(
    images: torch.Tensor, aux: torch.Tensor, texts: torch.Tensor, scale: float, factories: list[str]
) -> list:
    """Return recall@10 of the flat ranking: plain, balanced, and the same codes of f with the bias in full precision."""
    truth = {"clip": BalancedIndex.build(images, aux, scale, method="clip").search(texts, TOP)[1].numpy()}
    for method in ("bsap", "nnn"):
        truth[method] = BalancedIndex.build(images, aux, scale, method=method).search(texts, TOP)[1].numpy()
    rows = []
    for factory in factories:
        plain = faiss.index_factory(images.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        plain.train(images.numpy())
        if inverted := faiss.try_extract_index_ivf(plain):
            inverted.make_direct_map()
        plain.add(images.numpy())
        kept = recall(look(plain).search(texts.numpy(), TOP)[1], truth["clip"])
        decoded = torch.from_numpy(plain.reconstruct_n(0, len(images)))
        for method in [name for name in truth if name != "clip"]:
            shift, spread = shift_and_scale_from_features(images, aux, scale, method)
            full = ((scale * texts @ decoded.T - shift) / spread).topk(TOP).indices.numpy()
            balanced = BalancedIndex.build(images, aux, scale, method=method, factory=factory)
            look(balanced.index)
            found = recall(balanced.search(texts, TOP)[1].numpy(), truth[method])
            row = {"factory": factory, "method": method, "plain": kept, "balanced": found, "to_plain": found / kept}
            row |= {"codes_of_f_with_full_bias": recall(full, truth[method])}
            if inverted := faiss.try_extract_index_ivf(balanced.index):
                probes = PROBES
                while found < kept and probes < inverted.nlist:  # what probing costs, rather than precision
                    probes = inverted.nprobe = min(probes + PROBES // 4, inverted.nlist)
                    found = recall(balanced.search(texts, TOP)[1].numpy(), truth[method])
                row |= {"probes_for_the_plain_recall": probes if found >= kept else None}
            rows.append({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
            print(rows[-1], flush=True)
    return rows


def sizes_of_the_coordinate(
    images: torch.Tensor, aux: torch.Tensor, texts: torch.Tensor, scale: float, factory: str
) -> list:
    """Return recall@10 as the extra coordinate is made larger and smaller than `build` chooses it: 1 is its choice."""
    truth = BalancedIndex.build(images, aux, scale).search(texts, TOP)[1].numpy()
    chosen, rows = BalancedIndex.build(images, aux, scale, factory=factory), []
    for times in (16, 4, 1, 0.25):
        index = BalancedIndex.build(images[:0], aux, scale)  # with the settings, and an index of its own
        index.factory, index.offset, index.gain, index.unit = factory, chosen.offset, chosen.gain, chosen.unit / times
        index.index = faiss.index_factory(chosen.index.d, factory, faiss.METRIC_INNER_PRODUCT)
        index.index.train(index._vectors(images))
        index.add(images)
        look(index.index)
        rows.append({"times_as_large": times, "recall": round(recall(index.search(texts, TOP)[1].numpy(), truth), 4)})
    return rows


def main() -> None:
    load = os.getloadavg()[0]
    images, aux, texts, scale = sample()
    torch.manual_seed(0)
    wide, wide_aux, wide_texts = (normalize(torch.randn(n, 512) + 0.3, dim=1) for n in (20_000, 256, 200))
    synthetic = synthetic_features(images, COUNT)
    asked = texts[:300]
    lists = max(COUNT // 160, 16)
    factories = ["HNSW32", "SQ8", f"IVF{lists},Flat", f"IVF{lists},SQ8", "PQ16np", "PQ16np,RFlat"]
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "load_before": round(load, 2), "python": platform.python_version(),
                    "torch": torch.__version__, "faiss": faiss.__version__, "nnn": "1.0.1"},
        "against_nnn": {"sample": against_peer(images, aux, texts, scale),
                        "synthetic, 512 wide": against_peer(wide, wide_aux, wide_texts, 100.0)},
        "against_plain_flat": [against_plain(synthetic_features(images, 10**power), aux, texts, scale) for power in (4, 5, 6)]
                              + [against_plain(wide, wide_aux, wide_texts, 100.0)],
    }  # fmt: skip
    print(json.dumps(result, indent=1), flush=True)
    result["recall_at_10"] = {
        "nprobe": PROBES, "efSearch": BEAM, "k_factor": 10,
        "sample": compressed(images, aux, asked, scale, ["SQ8", "IVF32,Flat", "HNSW32"]),
        f"synthetic, {COUNT}": compressed(synthetic, aux, asked, scale, factories),
        "size_of_the_coordinate": sizes_of_the_coordinate(synthetic, aux, asked, scale, f"IVF{lists},Flat"),
    }  # fmt: skip
    print(result["recall_at_10"]["size_of_the_coordinate"])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    unfinished = RESULTS.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(RESULTS)


if __name__ == "__main__":
    sys.exit(main())
