"""Measure the balanced index: `python tests/benchmarks/retrieval.py` prints and writes results/retrieval.json.

(1) Against FAISS's plain flat index of the same vectors: what do building, searching and memory cost? (2) How much of a flat
ranking do compressed indexes keep, with the extra coordinate and without? What is compared runs in turn in each round, so
that a busy machine says the same as an idle one: times are of the processor, ratios the medians of the rounds' ratios.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bsap_utils import ROOT, BalancedIndex, auxiliary_prompts, ground_truth, load_refer, load_scorer
from bsap_utils.datasets import write_file

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
TOP, COUNT = 10, int(os.environ.get("VECTORS", 20_000))  # vectors in the compressed indexes
LOOK = {"nprobe": 16, "efSearch": 128, "k_factor": 10}


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Return CPU milliseconds (median, all threads) of each call, and the median ratio to the first of its round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counts in [False] + [True] * rounds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            if counts:
                times[name].append(1000 * (time.process_time() - start))
    base = next(iter(times.values()))
    ratios = {name: [own / first for own, first in zip(row, base, strict=True)] for name, row in times.items()}
    return {name: {"cpu_ms": round(statistics.median(row), 3), "ratio": round(statistics.median(ratios[name]), 3)}
            for name, row in times.items()}  # fmt: skip


def sample() -> tuple[Tensor, Tensor, Tensor, float]:
    """Return features of all annotated regions, of the bank `attributes`, of distinct val descriptions, and the scale."""
    os.chdir(ROOT)
    ds, scorer = load_refer("data/refshapes", "refshapes"), load_scorer("local-dir:data/clip-refshapes", device="cpu")
    images = scorer.encode_regions(ds, ground_truth(ds), ["crop"])[0]
    texts = sorted(set(ds.select("val").expressions["text"].str.lower()))
    bank, asked = (scorer.encode_texts(part, "a photo of {}") for part in (auxiliary_prompts("attributes", ds), texts))
    return images, bank, asked, scorer.logit_scale


def mixtures(features: Tensor, count: int) -> Tensor:
    """Return unit vectors like those of `features`, mixtures of two and a little noise: at any size, the biases spread alike."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(features), (2, count), generator=generator)
    mixed = torch.randn(count, features.shape[1], generator=generator).mul_(0.4 / math.sqrt(features.shape[1]))
    share = torch.rand(count, 1, generator=generator)
    return normalize(mixed.addcmul_(features[first], share).addcmul_(features[second], 1 - share), dim=1)


def against_plain(images: Tensor, aux: Tensor, texts: Tensor, scale: float) -> dict:
    plain, balanced = faiss.IndexFlatIP(images.shape[1]), BalancedIndex.build(images, aux, scale)
    plain.add(images.numpy())
    rounds = 5 if len(images) > 10**5 else 25
    found = {}
    for name, part in (("64 texts at once", texts[:64].contiguous()), ("one text", texts[:1].contiguous())):
        calls: dict[str, Callable[[], object]] = {
            "plain": lambda p=part: plain.search(p.numpy(), TOP),  # type: ignore[misc]
            "balanced": lambda p=part: balanced.search(p, TOP),  # type: ignore[misc]
        }
        found[name] = in_turn(calls, rounds)
    build: dict[str, Callable[[], object]] = {
        "bank times images": lambda: [part @ aux.T for part in images.split(2**12)]
    }
    build |= {name: lambda n=name: BalancedIndex.build(images, aux, scale, n) for name in ("bsap", "sinkhorn")}  # type: ignore[misc]
    size = [index.ntotal * index.sa_code_size() for index in (plain, balanced.index)]
    return {"vectors": len(images), "dimension": images.shape[1], "bytes": size, "build": in_turn(build, 1), **found}


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def look(index: faiss.Index) -> faiss.Index:
    """Set how far a search goes, the same for all."""
    if inverted := faiss.try_extract_index_ivf(index):
        inverted.nprobe = LOOK["nprobe"]
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = LOOK["efSearch"]
    if isinstance(index, faiss.IndexRefineFlat):
        index.k_factor = LOOK["k_factor"]
    return index


def compressed(images: Tensor, aux: Tensor, texts: Tensor, scale: float, factories: list[str]) -> list[dict]:
    """Return recall@10 of the flat ranking: of CLIP in a plain index, and of corrections in a balanced one."""
    rows = []
    truth = {
        name: BalancedIndex.build(images, aux, scale, name).search(texts, TOP)[1].numpy()
        for name in ("clip", "bsap", "csls")
    }
    for factory in factories:
        plain = faiss.index_factory(images.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        plain.train(images.numpy())
        plain.add(images.numpy())
        row: dict = {"factory": factory, "clip": recall(look(plain).search(texts.numpy(), TOP)[1], truth["clip"])}
        for name in ("bsap", "csls"):
            balanced = BalancedIndex.build(images, aux, scale, name, factory)
            look(balanced.index)
            row[name] = recall(balanced.search(texts, TOP)[1].numpy(), truth[name])
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    load = os.getloadavg()[0]
    images, aux, texts, scale = sample()
    torch.manual_seed(0)
    wide, wide_aux, wide_texts = (normalize(torch.randn(n, 512) + 0.3, dim=1) for n in (20_000, 256, 200))
    lists = max(COUNT // 160, 16)
    factories = ["HNSW32", "SQ8", f"IVF{lists},Flat", f"IVF{lists},SQ8", "PQ16np", "PQ16np,RFlat"]
    result = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                    "load_before": round(load, 2), "python": platform.python_version(), "torch": torch.__version__,
                    "faiss": faiss.__version__},
        "against_plain_flat": [against_plain(mixtures(images, 10**power), aux, texts, scale) for power in (4, 5, 6)]
                              + [against_plain(wide, wide_aux, wide_texts, 100.0)],
        "recall_at_10": {**LOOK, f"{COUNT} vectors": compressed(mixtures(images, COUNT), aux, texts[:300], scale, factories)},
    }  # fmt: skip
    print(json.dumps(result["against_plain_flat"], indent=1))
    write_file(RESULTS, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
