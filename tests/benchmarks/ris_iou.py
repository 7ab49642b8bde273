"""Time the mask IoU of RefCOCO val: `python tests/benchmarks/ris_iou.py` prints a table and writes results/ris_iou.json.

1,500 images of 640 × 480 with 12 candidate masks each and 11,000 expressions about three objects an image: reading the
candidates from a file of COCO results, and all IoUs of the pairs. Masks are blobs of several hundred runs, as people's
outlines have. To reach: under 60 s and under 2 GB.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from pycocotools import mask as coco

from bsap_utils.datasets import ReferDataset
from bsap_utils.regions import from_masks, pair_up

RESULTS = Path(__file__).parent / "results" / "ris_iou.json"
IMAGES, CANDIDATES, MEANT, EXPRESSIONS, HEIGHT, WIDTH = 1_500, 12, 3, 11_000, 480, 640


def blobs(count: int, generator: np.random.Generator) -> list[dict]:
    """Return RLE of polygons of 40 corners, compressed, counts as text."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = generator.uniform(30, 150, (count, 1)) * generator.uniform(0.7, 1.3, (count, 40))
    x = generator.uniform(0, WIDTH, (count, 1)) + radius * np.cos(angle)
    y = generator.uniform(0, HEIGHT, (count, 1)) + radius * np.sin(angle)
    polygons = np.stack([x.clip(0, WIDTH), y.clip(0, HEIGHT)], 2).reshape(count, -1)
    rles = coco.frPyObjects(polygons.tolist(), HEIGHT, WIDTH)
    return [{"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()} for rle in rles]


def world(generator: np.random.Generator) -> tuple[ReferDataset, list[dict]]:
    """Return a data set of RefCOCO val's size, and the entries of a file of masks."""
    images = pd.DataFrame(
        {"file_name": "x.jpg", "width": WIDTH, "height": HEIGHT}, index=pd.RangeIndex(IMAGES, name="image_id")
    )
    truth = blobs(IMAGES * MEANT, generator)
    boxes = coco.toBbox(truth)
    annotations = pd.DataFrame(boxes, columns=["x", "y", "w", "h"], index=pd.RangeIndex(len(truth), name="ann_id"))
    more = {"image_id": np.repeat(np.arange(IMAGES), MEANT), "category": "thing", "iscrowd": 0, "segmentation": truth}
    annotations = annotations.assign(**more)
    ann_id = generator.integers(0, len(truth), EXPRESSIONS)
    columns = {"ref_id": ann_id, "ann_id": ann_id, "image_id": ann_id // MEANT, "split": "val", "text": "it"}
    expressions = pd.DataFrame(columns, index=pd.RangeIndex(EXPRESSIONS, name="sent_id"))
    image_ids = np.repeat(np.arange(IMAGES), CANDIDATES).tolist()
    masks = blobs(IMAGES * CANDIDATES, generator)
    entries = [{"image_id": i, "segmentation": mask, "score": 0.5} for i, mask in zip(image_ids, masks, strict=True)]
    return ReferDataset("synthetic", "unc", Path(), images, annotations, expressions, {}), entries


def main() -> None:
    generator = np.random.default_rng(0)
    ds, entries = world(generator)
    at_rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.json"
        path.write_text(json.dumps(entries))
        start = time.perf_counter()
        candidates = from_masks(ds, path)
        read = time.perf_counter()
    pairs = pair_up(ds, candidates, masks=True)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "images": IMAGES, "candidates": len(candidates), "expressions": EXPRESSIONS, "pairs": len(pairs),
        "read the file, s": round(read - start, 2), "IoU of all pairs, s": round(done - read, 2),
        "all, s": round(done - start, 2),
        "peak memory of the process, MB": round(peak / 1024), "of which before it began, MB": round(at_rest / 1024),
        "load of the machine": round(os.getloadavg()[0], 1), "cores": os.cpu_count(), "python": platform.python_version(),
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:<34} {value}")
    assert result["all, s"] < 60 and result["peak memory of the process, MB"] < 2000
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
