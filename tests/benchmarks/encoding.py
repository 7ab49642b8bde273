"""Time scoring, end to end: `python tests/benchmarks/encoding.py` prints a table and writes results/encoding-<device>.json.

    python tests/benchmarks/encoding.py                                   # ViT-B-32 on the CPU, about a quarter of an hour
    python tests/benchmarks/encoding.py --device cuda --models ViT-B-32 ViT-L-14

200 JPEGs of 640 × 480 with 12 regions each, crop + blur, 7 expressions an image; weights are random, as time does not
depend on them. Rounds take turns: in each, the bare encoder gets ready tensors (views and tokens) at its best batch
size, `refer_logits` gets files, and the naive way (of few images, as it is slow) crops, blurs, preprocesses and encodes
for every expression again. So a busy moment hits all alike, and their ratios mean something on any machine. To reach:
end to end 90 % of the bare encoder on a CPU (on a GPU 60 % with ViT-B-32 and 90 % with ViT-L-14), 6 times the naive
way, and nothing encoded in a second run. Then 03_rec on the sample, with a warm cache: 10 s beyond its kernel's start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import open_clip
import pandas as pd
import torch
from normalization import processor
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import DataLoader

from bsap_utils import ROOT, scoring
from bsap_utils.datasets import ReferDataset
from bsap_utils.scoring import TEMPLATE, ClipScorer, refer_logits
from bsap_utils.visual_prompts import show_regions

IMAGES, REGIONS, EXPRESSIONS, PROMPTS = 200, 12, 7, ("crop", "blur")
VIEWS = REGIONS * len(PROMPTS)  # of an image


def made_up(folder: Path) -> ReferDataset:
    """Write the pictures, with as much detail as photographs have (about 100 KB each), and return their data set."""
    rng = np.random.default_rng(0)
    names = [f"{i:03d}.jpg" for i in range(IMAGES)]
    for name in names:
        detail = [rng.integers(0, 256, (480 // k, 640 // k, 3), dtype=np.uint8) for k in (80, 16, 4, 2)]
        layers = [np.asarray(Image.fromarray(d).resize((640, 480), Image.Resampling.BICUBIC), float) for d in detail]
        picture = np.average(layers, axis=0, weights=[8, 4, 2, 1])
        Image.fromarray(picture.astype(np.uint8)).save(folder / name, quality=90)
    image_id = np.repeat(np.arange(IMAGES), REGIONS)
    size = rng.uniform([30, 30], [300, 250], (len(image_id), 2))
    corner = rng.uniform(0, 1, size.shape) * ([640, 480] - size)
    regions = pd.DataFrame(np.hstack([corner, size]), columns=["x", "y", "w", "h"]).assign(
        image_id=image_id, category="x"
    )
    meant = np.arange(IMAGES * EXPRESSIONS)
    expressions = pd.DataFrame(
        {"ref_id": meant, "ann_id": meant // EXPRESSIONS * REGIONS, "image_id": meant // EXPRESSIONS}
    )
    expressions = expressions.assign(split="val", text=[f"the {n} thing on the left" for n in meant])
    images = pd.DataFrame({"file_name": names, "width": 640, "height": 480}).rename_axis("image_id")
    return ReferDataset("made up", "unc", folder, images, regions.rename_axis("ann_id"), expressions, {})


def first_images(ds: ReferDataset, count: int, start: int = 0) -> ReferDataset:
    """Return some images of a data set, with their regions and expressions."""
    of = range(start, start + count)
    parts = {name: getattr(ds, name)[getattr(ds, name)["image_id"].isin(of)] for name in ("regions", "expressions")}
    return ReferDataset(ds.name, ds.split_by, ds.image_root, ds.images.loc[list(of)], **parts, counts={})


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def naive(scorer: ClipScorer, preprocess: Callable[[Image.Image], torch.Tensor], ds: ReferDataset) -> None:
    """For every expression open the picture, cut, blur, preprocess and encode, as the reference code does without a cache."""
    with torch.inference_mode():
        for expression in ds.expressions.itertuples():
            image = ds.load_image(expression.image_id)
            text = scorer.model.encode_text(scorer.tokenizer([TEMPLATE.format(expression.text)]).to(scorer.device))
            of_image = ds.regions[ds.regions["image_id"] == expression.image_id]
            for prompt in PROMPTS:
                views = []
                for region in of_image.itertuples():
                    box = (region.x, region.y, region.x + region.w, region.y + region.h)
                    if prompt == "crop":
                        views.append(preprocess(image.crop(tuple(map(round, box)))))
                    else:
                        mask = Image.new("L", image.size)
                        ImageDraw.Draw(mask).rectangle(box, fill=255)
                        blurred = image.filter(ImageFilter.GaussianBlur(100))
                        views.append(preprocess(Image.composite(image, blurred, mask)))
                pixels = torch.stack(views).to(scorer.device, scorer._dtype)
                (scorer.model.encode_image(pixels) @ text.T).cpu()


def by_processes(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Do what `scoring.prefetch` does with two processes of a DataLoader."""

    class Items(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.items = list(items)

        def __len__(self) -> int:
            return len(self.items)

        def __getitem__(self, number: int) -> Any:
            return function(self.items[number])

    return iter(DataLoader(Items(), batch_size=None, num_workers=2, prefetch_factor=4))


def measure(name: str, device: str, ds: ReferDataset, folder: Path, rounds: int, compiled: bool) -> dict[str, Any]:
    """Return everything about one model."""
    checkpoint = folder / f"{name}.pt"
    torch.manual_seed(0)
    torch.save(open_clip.create_model(name, load_weights=False).state_dict(), checkpoint)
    scorer = ClipScorer(name, str(checkpoint), device=device, cache=False)
    where, model = scorer.device, scorer.model
    batches = (4, 8, 16, 32, 64) if where.type == "cpu" else (64, 128, 256, 512, 1024)
    ready = scorer._pixels(torch.randint(0, 256, (max(batches), 3, 224, 224), dtype=torch.uint8))
    bare: dict[int, list[float]] = {batch: [] for batch in batches}

    tokens = scorer.tokenizer([TEMPLATE.format(text) for text in ds.expressions["text"]]).to(where)

    def encode(count: int, batch: int, visual: Callable = model.encode_image, texts: int = 0) -> None:
        """Encode ready tensors: `count` views, and that many texts, which are a part of CLIP's forward pass, too."""
        with torch.inference_mode():
            for start in range(0, count, batch):
                visual(ready[: min(batch, count - start)])
            for part in tokens[:texts].split(batch):
                model.encode_text(part)

    for again in range(4):  # the first round warms up
        for batch in batches:
            took = seconds(where, lambda b=batch: encode(max(batches), b))  # type: ignore[misc]
            bare[batch] += [max(batches) / took] if again else []
    best = max(bare, key=lambda batch: statistics.median(bare[batch]))

    each, few = IMAGES // rounds, 1 if where.type == "cpu" else 20
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    spent: dict[str, list[float]] = {"bare encoder": [], "end to end": [], "naive": []}
    refer_logits([scorer], first_images(ds, 2), first_images(ds, 2).regions, ["star"], PROMPTS)  # warms up
    for number in range(rounds):
        part = first_images(ds, each, number * each)
        spent["bare encoder"].append(seconds(where, lambda: encode(each * VIEWS, best, texts=each * EXPRESSIONS)))
        scorer._text_features.clear()
        call = lambda p=part: refer_logits([scorer], p, p.regions, ["star"] * 16, PROMPTS)  # noqa: E731
        spent["end to end"].append(seconds(where, call))
        some = first_images(ds, few, number * each)
        spent["naive"].append(seconds(where, lambda s=some: naive(scorer, preprocess, s)) * each / few)  # type: ignore[misc]

    part = first_images(ds, 10 if where.type == "cpu" else min(each, 100))
    decode = seconds(where, lambda: [scoring.read_image(part, i, where) for i in part.images.index])
    images = [scoring.read_image(part, i, where) for i in part.images.index]
    boxes = torch.tensor(part.regions[["x", "y", "w", "h"]].to_numpy(np.float32)).split(REGIONS)
    shown = seconds(where, lambda: [show_regions(i, b, PROMPTS, 224) for i, b in zip(images, boxes, strict=True)])
    texts = [f"the {n} thing" for n in range(len(part.expressions))]
    text = seconds(where, lambda: scorer.encode_texts(texts))
    views = len(images) * VIEWS
    stages = {"encoder": 1e3 / statistics.median(bare[best]), "decode": 1e3 * decode / views,
              "views": 1e3 * shown / views, "texts": 1e3 * text / views}  # fmt: skip

    readers: dict[str, list[float]] = {"1 thread": [], "2 threads": [], "4 threads": [], "DataLoader, 2 processes": []}
    before = scoring.prefetch
    for _ in range(2 if where.type == "cpu" else 5):
        for kind, times in readers.items():
            scoring.prefetch = (  # type: ignore[assignment]
                by_processes if "DataLoader" in kind else lambda f, i, n=int(kind[0]): before(f, i, n)
            )
            if where.type != "cpu" and "DataLoader" in kind:
                continue  # a child process cannot share the parent's CUDA
            times.append(seconds(where, lambda: scorer.encode_regions(part, part.regions, PROMPTS)))
    scoring.prefetch = before

    ratios = {
        way: [a / b for a, b in zip(spent[way], spent["end to end"], strict=True)] for way in ("bare encoder", "naive")
    }
    found = {
        "model": name, "device": str(where), "precision": scorer.precision, "images": rounds * each,
        "views": rounds * each * VIEWS,
        "bare_views_per_second": {str(b): round(statistics.median(rates), 2) for b, rates in bare.items()},
        "best_batch": best, "batch_size": scorer.batch_size,
        "seconds": {key: round(sum(times), 2) for key, times in spent.items()},
        "end_to_end_share_of_bare": {"median": round(statistics.median(ratios["bare encoder"]), 3),
                                     "rounds": [round(r, 3) for r in ratios["bare encoder"]]},
        "times_faster_than_naive": {"median": round(statistics.median(ratios["naive"]), 2),
                                    "rounds": [round(r, 2) for r in ratios["naive"]]},
        "milliseconds_per_view": {key: round(value, 3) for key, value in stages.items()},
        "views_per_second_by_reader": {k: round(len(part.regions) * len(PROMPTS) / min(t), 2) for k, t in readers.items() if t},
    }  # fmt: skip
    if compiled:
        fast = torch.compile(model.encode_image)
        start = seconds(where, lambda: encode(2 * best, best, fast))
        plain, quick = (statistics.median(seconds(where, lambda v=v: encode(4 * best, best, v)) for _ in range(5))  # type: ignore[misc]
                        for v in (model.encode_image, fast))  # fmt: skip
        saved = (plain - quick) / (4 * best)
        found["compile"] = {"seconds_to_compile": round(start, 1), "speedup": round(plain / quick, 3),
                            "views_until_it_pays": round(start / saved) if saved > 0 else None}  # fmt: skip
    return found


def warm(ds: ReferDataset, folder: Path) -> dict[str, Any]:
    """Return what a second run costs: of a model's scoring, and of 03_rec on the sample, with its kernel's cells only."""
    os.environ["BSAP_CACHE"] = str(folder / "cache")
    part = first_images(ds, 20)
    torch.save(open_clip.create_model("ViT-S-32-alt", load_weights=False).state_dict(), folder / "small.pt")
    counts = []
    for _ in range(2):
        scorer = ClipScorer("ViT-S-32-alt", str(folder / "small.pt"), device="cpu")
        encode, seen = scorer.model.encode_image, []
        scorer.model.encode_image = lambda pixels, encode=encode, seen=seen: seen.append(len(pixels)) or encode(pixels)
        took = seconds(scorer.device, lambda s=scorer: refer_logits([s], part, part.regions, ["star"], PROMPTS))  # type: ignore[misc]
        counts.append({"seconds": round(took, 2), "views_encoded": sum(seen)})
    runs = []
    for _ in range(2):
        command = [sys.executable, "-m", "bsap_utils.cli", "run", "03_rec", "-p", "OUT_DIR", str(folder / "03")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        executed = next(line for line in done.stdout.splitlines() if "executed notebook" in line).split()[2]
        cells = nbformat.read(ROOT / executed, 4).cells
        runs.append(round(sum(cell.metadata.papermill.duration or 0 for cell in cells), 1))
    return {"scoring": dict(zip(("first", "second"), counts, strict=True)),
            "03_rec_seconds_beyond_kernel_start": dict(zip(("first", "second"), runs, strict=True))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="also try torch.compile, which takes about a minute")
    given = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {
            "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
            "load_before": round(os.getloadavg()[0], 2), "python": platform.python_version(),
            "torch": torch.__version__, "open_clip": open_clip.__version__,
        }
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        ds = made_up(folder / "images")
        result["models"] = [measure(m, given.device, ds, folder, given.rounds, given.compile) for m in given.models]
        result["second_run"] = warm(ds, folder)
    result["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    rows = {one["model"]: {"share of bare encoder": one["end_to_end_share_of_bare"]["median"],
                           "times naive": one["times_faster_than_naive"]["median"], "best batch": one["best_batch"],
                           **{f"{stage}, ms a view": ms for stage, ms in one["milliseconds_per_view"].items()}}
            for one in result["models"]}  # fmt: skip
    print(pd.DataFrame(rows).to_string())
    print(json.dumps({"second_run": result["second_run"], "machine": result["machine"]}, indent=1))
    out = Path(__file__).parent / f"results/encoding-{given.device}.json"
    out.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".part").replace(out)


if __name__ == "__main__":
    main()
