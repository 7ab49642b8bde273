"""Time the normalization: `python tests/benchmarks/normalization.py` prints and writes results/normalization.json.

How much longer than its matrix product does the bias of 100,000 regions × 512 dimensions × 500 auxiliary prompts take, and
how much memory? Does a bank of 100,000 prompts take time in proportion? How long do all methods, a table and slices take
at RefCOCO's size? Seconds are the process's own (CPU), the least of rounds in which everything runs once: neighbours on a
busy machine only add to them.
"""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from bsap_utils.evaluation import rec_table
from bsap_utils.normalization import METHODS, pool, shift_and_scale_from_features
from bsap_utils.regions import Pairs

RESULTS = Path(__file__).parent / "results" / "normalization.json"


def seconds(calls: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Return the least CPU seconds of each call of `rounds` rounds, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counts in [False] + [True] * rounds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name] += [time.process_time() - start] * counts
    return {name: min(values) for name, values in times.items()}


def peak_mib(call: Callable[[], object]) -> float | None:
    """Return by how much memory rises above what is held now while `call` runs, in MiB, looked at every 2 ms (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def memory() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))

    seen, done = [memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(memory())

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return round((max(seen) - seen[0]) / 1024, 1)


def features(count: int) -> torch.Tensor:
    return normalize(torch.randn(count, 512), dim=1)


def table_of_pairs(images: int, expressions: int, candidates: int) -> Pairs:
    """Random pairs: `expressions` on `images`, each image with `candidates`."""
    generator = np.random.default_rng(0)
    image = np.sort(np.r_[np.arange(images), generator.integers(0, images, expressions - images)])
    expression = np.repeat(np.arange(expressions), candidates)
    candidate = image[expression] * candidates + np.tile(np.arange(candidates), expressions)
    return Pairs(*map(torch.from_numpy, (expression, candidate, image[expression], generator.random(len(expression)))))


def of_features() -> dict[str, float | None]:
    """The bias in blocks against the matrix product, for a usual bank and a large one."""
    regions, bank = features(100_000), features(500)
    few, many = regions[:1000], features(100_000)
    memory = {  # first: later calls find memory that is held already
        "MiB above what is held": peak_mib(lambda: shift_and_scale_from_features(regions, bank, 100.0)),
        "MiB, large bank (its scaled copy is 195)": peak_mib(lambda: shift_and_scale_from_features(few, many, 100.0)),
    }
    time_of = seconds({
        "product": lambda: regions @ bank.T,
        "in blocks": lambda: shift_and_scale_from_features(regions, bank, 100.0),
        "at once, float64": lambda: pool(100 * (regions @ bank.T)),
        "sinkhorn": lambda: shift_and_scale_from_features(regions, bank, 100.0, "sinkhorn"),
        "product, large bank": lambda: few @ many.T,
        "in blocks, large bank": lambda: shift_and_scale_from_features(few, many, 100.0),
    })  # fmt: skip
    return {
        **{f"seconds, {name}": round(value, 3) for name, value in time_of.items()},
        "ratio to the product": round(time_of["in blocks"] / time_of["product"], 2),
        "ratio to the product, large bank": round(time_of["in blocks, large bank"] / time_of["product, large bank"], 2),
    } | memory


def of_pairs() -> dict[str, float | None]:
    """All methods and the table at RefCOCO val's size, slices at that of the whole data set."""
    pairs = table_of_pairs(1_500, 10_834, 13)
    s, a = torch.randn(len(pairs)), torch.randn(1_500 * 13, 80)
    options = {
        "bsap_calibrated": {"mean_logit": a.mean(1), "image": torch.arange(1_500).repeat_interleave(13)},
        "db_norm": {"image_logits": a},
    }
    scores = {name: method(s, a, pairs, **options.get(name, {})) for name, method in METHODS.items()}
    whole = table_of_pairs(19_994, 142_210, 3)
    three = {name: torch.rand(len(whole)) for name in ("clip", "bsap", "bsap_h")}
    kinds = pd.Series(np.random.default_rng(0).integers(0, 3, 142_210), name="kind")
    slices = peak_mib(lambda: rec_table(whole, three, by=kinds))
    time_of = seconds({
        f"all {len(METHODS)} methods": lambda: [
            method(s, a, pairs, **options.get(name, {})) for name, method in METHODS.items()
        ],
        "rec_table of them": lambda: rec_table(pairs, scores),
        "slices of 142,210 expressions": lambda: rec_table(whole, three, by=kinds),
    }, rounds=3)  # fmt: skip
    return {f"seconds, {name}": round(value, 3) for name, value in time_of.items()} | {"MiB, slices": slices}


def main() -> None:
    torch.manual_seed(0)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "python": platform.python_version(), "torch": torch.__version__.split("+")[0]}  # fmt: skip
    result = {"machine": machine, "from features": of_features(), "on pairs": of_pairs()}
    for name, part in result.items():
        print(pd.Series(part, name=name).to_string() + "\n")
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
