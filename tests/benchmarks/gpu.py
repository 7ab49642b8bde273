"""The CUDA path, proven and timed: `python tests/benchmarks/gpu.py` on one H100-class machine, under eight minutes.

It needs no network: weights and JPEGs are made on the spot. (a) `pytest -m gpu`; (b) ViT-B-32 and ViT-L-14 in bf16, bare
and end to end, as `encoding.py` has it, with a profile of where the time goes (goals: 60 % and 90 % of the bare encoder);
(c) the bias of 10⁶ regions against the matrix product in it. Results go to results/encoding-gpu.json. `--small` does the
same on a CPU with a small model, so that this cannot rot: nothing is written then. Where PyTorch, torchvision, pandas,
scipy, pyarrow and pytest are, wheels of open_clip_torch, ftfy, wcwidth, pycocotools, faiss-cpu and lazy_loader (21 MB)
are all it lacks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from encoding import end_to_end, machine, made_up, measure, random_scorer, seconds, some
from torch.profiler import ProfilerActivity, profile

from bsap_utils import ROOT
from bsap_utils.datasets import ReferDataset
from bsap_utils.normalization import shift_and_scale_from_features
from bsap_utils.scoring import ClipScorer

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def gpu_tests() -> dict[str, Any]:
    """Return what `pytest -m gpu` says, in its last line and the names of what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr[-2000:]]
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": done.returncode, "summary": lines[-1], "failed": failed}


def where_the_time_goes(scorer: ClipScorer, ds: ReferDataset) -> list[dict[str, Any]]:
    """Return the ten operations that take the device most of its time in an end-to-end run, in milliseconds."""
    cuda = scorer.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        end_to_end(scorer, ds)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: getattr(row, own), reverse=True)[:10]
    return [{"operation": re.sub(r"\s+", " ", row.key)[:80], "calls": row.count, "ms": round(getattr(row, own) / 1e3, 2)}
            for row in rows]  # fmt: skip


def bias_against_product(device: str, regions: int, width: int, prompts: int) -> dict[str, float]:
    """Return the seconds that the bias of so many regions takes, and the bare matrix product in it."""
    generator = torch.Generator().manual_seed(0)
    unit = [torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=-1).to(device)
            for n in (regions, prompts)]  # fmt: skip
    ways = {
        "product": lambda: [part @ unit[1].T for part in unit[0].split(2**18)],
        "bias": lambda: shift_and_scale_from_features(unit[0], unit[1], 100.0, "bsap", block=2**18 * prompts),
    }
    times = {name: min(seconds(torch.device(device), way) for _ in range(4)) for name, way in ways.items()}
    return {name: round(took, 4) for name, took in times.items()} | {
        "ratio": round(times["bias"] / times["product"], 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU, in seconds, to see that it runs")
    small = parser.parse_args().small
    device, start = "cpu" if small else "cuda", time.monotonic()
    models, images, rounds = (["tiny"], 2, 1) if small else (["ViT-B-32", "ViT-L-14"], 200, 4)
    result: dict[str, Any] = {"machine": machine(device), "tests": {} if small else gpu_tests(), "models": []}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "tiny.json").write_text(json.dumps(TINY))
        open_clip.add_model_config(Path(place))
        ds = made_up(Path(place), images)
        for name in models:
            scorer = random_scorer(name, device, Path(place), cache=False)
            found = measure(scorer, ds, rounds, small)
            found["profile"] = where_the_time_goes(scorer, some(ds, 0, min(images // 2, 50)))
            result["models"].append(found)
            print(json.dumps(found, indent=1), flush=True)
    sizes = (1000, 64, 50) if small else (1_000_000, 512, 500)
    result["bias"] = {"sizes": sizes, "seconds": bias_against_product(device, *sizes)}
    result["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps({key: result[key] for key in ("machine", "tests", "bias", "seconds")}, indent=1))
    if not small:
        out = Path(__file__).parent / "results/encoding-gpu.json"
        out.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".part").replace(out)
    sys.exit(result["tests"].get("exit_code", 0))


if __name__ == "__main__":
    main()
