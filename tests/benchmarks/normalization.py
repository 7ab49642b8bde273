"""Time the normalization: `python tests/benchmarks/normalization.py` prints and writes results/normalization.json.

Two questions. How much longer than its matrix product does the region bias of 100,000 regions × 512 dimensions × 500
auxiliary prompts take, and how much memory? How long do all nine methods take on groups of RefCOCO val's size? Times
are the median of rounds in which everything runs once, so that a busy moment of the machine hits all alike; ratios
within one run mean something on any machine.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from bsap_utils.evaluation import cluster_bootstrap, pick_regions
from bsap_utils.normalization import METHODS, region_bias, region_bias_from_features

RESULTS = Path(__file__).parent / "results" / "normalization.json"
REGIONS, WIDTH, PROMPTS = 100_000, 512, 500
IMAGES, REGIONS_AN_IMAGE, EXPRESSIONS, BANK = 1_500, 12, 10_834, 80
ROUNDS = 11


def seconds(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return the seconds of each call in each of `rounds` rounds, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counts in [False] + [True] * rounds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if counts:
                times[name].append(time.perf_counter() - start)
    return times


def peak_mib(call: Callable[[], object]) -> float | None:
    """Return by how much memory rises above what is held now while `call` runs, in MiB; only Linux can tell."""

    def memory(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    status = Path("/proc/self/status")
    if not status.exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (man 5 proc)
    before = memory("VmRSS")
    call()
    return round((memory("VmHWM") - before) / 1024, 1)


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Return query and auxiliary logits and groups of RefCOCO val's size, and the image of each expression."""
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(IMAGES), generator.integers(1, 2 * REGIONS_AN_IMAGE, IMAGES))
    image = np.concatenate([np.arange(IMAGES), generator.integers(0, IMAGES, EXPRESSIONS - IMAGES)])
    count = np.bincount(image)
    query, aux = (22 + 3 * generator.standard_normal((len(group), n), dtype=np.float32) for n in (count.max(), BANK))
    query[np.arange(count.max()) >= count[group][:, None]] = np.nan
    return torch.tensor(query), torch.tensor(aux), torch.tensor(group), image


def main() -> None:
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    features = normalize(torch.randn(REGIONS, WIDTH), dim=1)
    prompts = normalize(torch.randn(PROMPTS, WIDTH), dim=1)
    blocks_mib = peak_mib(lambda: region_bias_from_features(features, prompts, 100.0))
    bias = {
        "matrix product": lambda: features @ prompts.T,
        "region_bias_from_features": lambda: region_bias_from_features(features, prompts, 100.0),
        "region_bias(100 * product)": lambda: region_bias(100 * (features @ prompts.T)),
    }
    whole_mib = peak_mib(bias["region_bias(100 * product)"])
    times = seconds(bias)
    fused = [a / b for a, b in zip(times["region_bias_from_features"], times["matrix product"], strict=True)]

    query, aux, group, image = ragged()
    methods: dict[str, Callable[[], object]] = {
        name: lambda m=method: m(query, aux, group)  # type: ignore[misc]
        for name, method in METHODS.items()
    }
    hits = np.random.default_rng(0).random((EXPRESSIONS, len(METHODS))) < 0.5
    others = {
        "pick_regions": lambda: pick_regions(query, group),
        "cluster_bootstrap": lambda: cluster_bootstrap(hits, image),
    }
    times |= seconds(methods | others)
    median = {name: statistics.median(values) for name, values in times.items()}

    result = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": round(load, 2),
            "system": platform.system(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "region_bias": {
            "shape": [REGIONS, WIDTH, PROMPTS],
            "ratio_to_matrix_product": round(statistics.median(fused), 3),
            "extra_memory_mib": blocks_mib,
            "extra_memory_mib_without_blocks": whole_mib,
        },
        "ragged": {
            "images": IMAGES,
            "regions": len(group),
            "expressions": EXPRESSIONS,
            "slots": query.shape[1],
            "prompts": BANK,
            "nine_methods_seconds": round(sum(median[name] for name in METHODS), 4),
        },
        "seconds": {name: round(value, 5) for name, value in median.items()},
    }
    print(pd.Series(median, name="seconds (median)").to_string(float_format="%.4f"))
    for part in ("machine", "region_bias", "ragged"):
        print(f"\n{part}\n" + "\n".join(f"  {name}: {value}" for name, value in result[part].items()))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    unfinished = RESULTS.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(RESULTS)


def processor() -> str:
    """Return the processor's name as Linux tells it, else as Python knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
