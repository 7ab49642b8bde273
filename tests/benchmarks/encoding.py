"""Time scoring, end to end: `python tests/benchmarks/encoding.py` prints a table and writes results/encoding-<device>.json.

    python tests/benchmarks/encoding.py                                   # ViT-B-32 on the CPU, about a quarter of an hour
    python tests/benchmarks/encoding.py --rounds 2 --images 16            # a few minutes
    python tests/benchmarks/encoding.py --device cuda --models ViT-B-32 ViT-L-14

JPEGs of 640 × 480 with 12 regions each, crop + blur, 7 expressions an image; weights are random, as time does not depend
on them. Rounds take turns: in each, the bare encoder gets ready tensors (views and tokens) at its best batch size, the
scorer gets files, and the naive way (of one image, as it is slow) crops, blurs, preprocesses and encodes for every
expression again. So a busy moment hits all alike, and their ratios mean something on any machine. To reach: end to end
90 % of the bare encoder on a CPU (on a GPU 60 % with ViT-B-32 and 90 % with ViT-L-14), 7 times the naive way, and nothing
encoded in a second run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw, ImageFilter

from bsap_utils import scoring
from bsap_utils.datasets import ReferDataset
from bsap_utils.regions import pair_up
from bsap_utils.scoring import TEMPLATE, ClipScorer
from bsap_utils.visual_prompts import show_regions

REGIONS, EXPRESSIONS, PROMPTS = 12, 7, ("crop", "blur")
VIEWS = REGIONS * len(PROMPTS)  # of an image


def made_up(folder: Path, count: int) -> ReferDataset:
    """Write pictures with as much detail as photographs have (about 100 KB each); their objects are the candidates."""
    rng = np.random.default_rng(0)
    names = [f"{i:03d}.jpg" for i in range(count)]
    for name in names:
        detail = [rng.integers(0, 256, (480 // k, 640 // k, 3), dtype=np.uint8) for k in (80, 16, 4, 2)]
        layers = [np.asarray(Image.fromarray(d).resize((640, 480), Image.Resampling.BICUBIC), float) for d in detail]
        picture = np.average(layers, axis=0, weights=[8, 4, 2, 1])
        Image.fromarray(picture.astype(np.uint8)).save(folder / name, quality=90)
    size = rng.uniform([30, 30], [300, 250], (count * REGIONS, 2))
    corner = rng.uniform(0, 1, size.shape) * ([640, 480] - size)
    annotations = pd.DataFrame(np.hstack([corner, size]), columns=["x", "y", "w", "h"])
    annotations["image_id"] = np.repeat(np.arange(count), REGIONS)
    meant = np.arange(count * EXPRESSIONS)
    expressions = pd.DataFrame({"image_id": meant // EXPRESSIONS, "ann_id": meant // EXPRESSIONS * REGIONS})
    expressions["text"] = [f"the {n} thing on the left" for n in meant]
    images = pd.DataFrame({"file_name": names, "width": 640, "height": 480})
    return ReferDataset("made up", "unc", folder, images, annotations, expressions, counts={})


def some(ds: ReferDataset, start: int, count: int) -> ReferDataset:
    """Return some images of a data set, with their objects and expressions numbered anew."""
    parts = []
    for frame in (ds.annotations, ds.expressions):
        own = frame[frame["image_id"].between(start, start + count - 1)].reset_index(drop=True)
        parts.append(own.assign(image_id=own["image_id"] - start))
    parts[1]["ann_id"] -= start * REGIONS
    images = ds.images.iloc[start : start + count].reset_index(drop=True)
    return ReferDataset(ds.name, ds.split_by, ds.image_root, images, *parts, counts={})


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Return how long something takes, until the device has done it."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def end_to_end(scorer: ClipScorer, ds: ReferDataset) -> None:
    """Score every candidate of every image against its expressions and a bank, from files."""
    scorer._texts.clear()
    pairs = pair_up(ds, ds.annotations)
    image = scorer.encode_regions(ds, ds.annotations, PROMPTS)
    scorer.pair_logits(image, scorer.encode_texts(ds.expressions["text"], TEMPLATE), pairs)
    scorer.logits(image, scorer.encode_texts(["star"] * 16, TEMPLATE))


def naive(scorer: ClipScorer, ds: ReferDataset) -> None:
    """Crop, blur, preprocess and encode for every expression again, as reference code does without a cache."""
    preprocess = image_transform_v2(PreprocessCfg(**scorer.preprocess), is_train=False)
    for expression in ds.expressions.itertuples():
        image = ds.load_image(expression.image_id)
        tokens = scorer.tokenizer([TEMPLATE.format(expression.text)]).to(scorer.device)
        own = ds.annotations[ds.annotations["image_id"] == expression.image_id]
        for prompt in PROMPTS:
            views = []
            for region in own.itertuples():
                box = tuple(map(round, (region.x, region.y, region.x + region.w, region.y + region.h)))
                mask = Image.new("L", image.size)
                ImageDraw.Draw(mask).rectangle(box, fill=255)
                outside = image.filter(ImageFilter.GaussianBlur(100)) if prompt == "blur" else image
                views.append(preprocess(image.crop(box) if prompt == "crop" else Image.composite(image, outside, mask)))
            pixels = torch.stack(views).to(scorer.device, scoring.DTYPES[scorer.precision])
            with torch.inference_mode():
                (scorer.model.encode_image(pixels) @ scorer.model.encode_text(tokens).T).cpu()


def random_scorer(name: str, device: str, folder: Path, **options: Any) -> ClipScorer:
    """Return a scorer with random weights, written and read as a checkpoint is."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model(name, load_weights=False).state_dict(), folder / f"{name}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that do not say what they were trained with
        return ClipScorer(name, str(folder / f"{name}.pt"), device, **options)


def bare_rates(scorer: ClipScorer, ready: torch.Tensor, batches: tuple[int, ...]) -> dict[int, float]:
    """Return the views a second of the bare encoder at each batch size."""
    rates: dict[int, list[float]] = {batch: [] for batch in batches}
    for number in range(4):  # the first round warms up
        for batch in batches:
            took = seconds(scorer.device, lambda b=batch: encode(scorer, ready, len(ready), b))  # type: ignore[misc]
            rates[batch] += [len(ready) / took] if number else []
    return {batch: statistics.median(found) for batch, found in rates.items()}


def encode(scorer: ClipScorer, ready: torch.Tensor, count: int, batch: int, tokens: torch.Tensor | None = None) -> None:
    """Encode `count` ready views, and texts, which are a part of CLIP's forward pass, too."""
    with torch.inference_mode():
        for start in range(0, count, batch):
            scorer.model.encode_image(ready[: min(batch, count - start)])
        for part in () if tokens is None else tokens.split(batch):
            scorer.model.encode_text(part)


def measure(scorer: ClipScorer, ds: ReferDataset, rounds: int, small: bool = False) -> dict[str, Any]:
    """Return everything about one model; `small`, only that it can be measured."""
    where, total = scorer.device, len(ds.images)
    batches = (4,) if small else (8, 16, 32) if where.type == "cpu" else (128, 256, 512, 1024)
    size = scorer.image_size
    ready = scorer._pixels(torch.randint(0, 256, (max(batches), 3, *size), dtype=torch.uint8))
    rates = bare_rates(scorer, ready, batches)
    best = max(rates, key=rates.__getitem__)

    each = max(total // rounds, 1)
    few, asked = 1 if where.type == "cpu" else min(each, 10), 1 if small else EXPRESSIONS
    tokens = scorer.tokenizer([TEMPLATE.format(text) for text in ds.expressions["text"][: each * EXPRESSIONS]]).to(
        where
    )
    spent: dict[str, list[float]] = {"bare encoder": [], "end to end": [], "naive": []}
    end_to_end(scorer, some(ds, 0, 1))  # warms up
    for number in range(rounds):
        part, slow = some(ds, number * each, each), some(ds, number * each, few)
        slow = dataclasses.replace(slow, expressions=slow.expressions.head(few * asked))
        spent["bare encoder"].append(seconds(where, lambda: encode(scorer, ready, each * VIEWS, best, tokens)))
        spent["end to end"].append(seconds(where, lambda p=part: end_to_end(scorer, p)))  # type: ignore[misc]
        took = seconds(where, lambda p=slow: naive(scorer, p))  # type: ignore[misc]
        spent["naive"].append(took * each / few * EXPRESSIONS / asked)

    part = some(ds, 0, min(each, 10 if where.type == "cpu" else 100))
    images = [scoring.read_image(part, i, where) for i in part.images.index]
    boxes = torch.tensor(part.annotations[["x", "y", "w", "h"]].to_numpy(np.float32)).split(REGIONS)
    views = len(images) * VIEWS
    decode = seconds(where, lambda: [scoring.read_image(part, i, where) for i in part.images.index])
    work = list(itertools.product(zip(images, boxes, strict=True), PROMPTS))
    shown = seconds(where, lambda: [show_regions(i, b, prompt, size) for (i, b), prompt in work])
    ratios = {
        way: [a / b for a, b in zip(spent[way], spent["end to end"], strict=True)] for way in ("bare encoder", "naive")
    }
    return {
        "model": scorer.model_name, "device": str(where), "precision": scorer.precision, "images": rounds * each,
        "views": rounds * each * VIEWS, "best_batch": best, "batch_size": scorer.batch_size,
        "bare_views_per_second": {str(batch): round(rate, 2) for batch, rate in rates.items()},
        "views_per_second": round(rounds * each * VIEWS / sum(spent["end to end"]), 2),
        "end_to_end_share_of_bare": {"median": round(statistics.median(ratios["bare encoder"]), 3),
                                     "rounds": [round(ratio, 3) for ratio in ratios["bare encoder"]]},
        "times_faster_than_naive": {"median": round(statistics.median(ratios["naive"]), 2),
                                    "rounds": [round(ratio, 2) for ratio in ratios["naive"]]},
        "milliseconds_per_view": {"encoder": round(1e3 / rates[best], 3), "decode": round(1e3 * decode / views, 3),
                                  "views": round(1e3 * shown / views, 3)},
    }  # fmt: skip


def second_run(name: str, device: str, ds: ReferDataset, folder: Path) -> dict[str, Any]:
    """Return what a second run costs and encodes."""
    os.environ["BSAP_CACHE"] = str(folder / "cache")
    found = {}
    for run in ("first", "second"):
        scorer, seen = random_scorer(name, device, folder), []
        bare = scorer.model.encode_image
        scorer.model.encode_image = lambda pixels, bare=bare, seen=seen: seen.append(len(pixels)) or bare(pixels)
        took = seconds(scorer.device, lambda s=scorer: end_to_end(s, ds))  # type: ignore[misc]
        found[run] = {"seconds": round(took, 2), "views_encoded": sum(seen)}
    return found


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {"gpu": gpu, "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2), "torch": torch.__version__,
            "python": platform.python_version(), "open_clip": open_clip.__version__}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=200)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(given.device)}
    with tempfile.TemporaryDirectory() as place:
        ds = made_up(Path(place), given.images)
        result["models"] = [
            measure(random_scorer(name, given.device, Path(place), cache=False), ds, given.rounds)
            for name in given.models
        ]
        result["second_run"] = second_run("ViT-S-32-alt", given.device, some(ds, 0, min(20, given.images)), Path(place))
    print(json.dumps(result, indent=1))
    out = Path(__file__).parent / f"results/encoding-{given.device}.json"
    out.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".part").replace(out)


if __name__ == "__main__":
    main()
