"""How long `load_refer`, candidates and pairs take, and in how much memory, at the full size of RefCOCO.

    python tests/benchmarks/loader.py

The data set is made up (no download), with as many images, annotations and expressions as RefCOCO (UNC), polygons of
COCO's usual length, and a protocol-0 pickle as published. The seconds, of one run, are of the processor, which other
work on the machine hardly changes; they go to results/loader.json.
"""

import json
import pickle
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bsap_utils.datasets import load_refer
from bsap_utils.regions import from_boxes, ground_truth, pair_up

IMAGES, ANNOTATIONS, REFS, EXPRESSIONS = 19_994, 196_771, 50_000, 142_210
LIMIT_SECONDS, LIMIT_GIB = 20, 3


def write(root: Path) -> None:
    """Write a data set of RefCOCO's size, and detections, under `root`."""
    rng = np.random.default_rng(0)
    image_of = np.sort(rng.integers(0, IMAGES, ANNOTATIONS))
    near = rng.uniform(0, 400, (ANNOTATIONS, 2)).round(2)
    boxes = np.hstack([near, rng.uniform(5, 200, (ANNOTATIONS, 2)).round(2)])
    points = np.maximum(rng.geometric(1 / 25, ANNOTATIONS), 3)
    polygons = np.split(rng.uniform(0, 400, 2 * points.sum()).round(2), np.cumsum(2 * points)[:-1])
    annotations = [
        {"id": i, "image_id": int(image), "category_id": i % 80 + 1, "bbox": box}
        | {"area": 100.0, "iscrowd": int(i % 90 == 0), "segmentation": [polygon.tolist()]}
        for i, (image, box, polygon) in enumerate(zip(image_of, boxes.tolist(), polygons, strict=True))
    ]
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": 640, "height": 480} for i in range(IMAGES)
    ]
    categories = [{"id": i, "name": f"category {i}"} for i in range(1, 81)]
    meant = np.sort(rng.choice(ANNOTATIONS, REFS, replace=False)).tolist()
    sentences: list[list[dict]] = [[] for _ in meant]
    for sent_id, ref in enumerate(
        np.concatenate([np.arange(REFS), rng.integers(0, REFS, EXPRESSIONS - REFS)]).tolist()
    ):
        tokens = [f"w{word}" for word in rng.integers(0, 9000, 4)]
        text = " ".join(tokens)
        sentences[ref].append({"tokens": tokens, "raw": text.upper(), "sent": text, "sent_id": sent_id})
    refs = [
        {"ref_id": i, "ann_id": ann_id, "image_id": int(image_of[ann_id]), "category_id": 1, "sentences": sentences[i]}
        | {"split": ("train", "val", "testA", "testB")[i % 4], "sent_ids": [s["sent_id"] for s in sentences[i]]}
        | {"file_name": f"COCO_train2014_{i:012d}_{i}.jpg"}
        for i, ann_id in enumerate(meant)
    ]
    (root / "refcoco").mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "refcoco/instances.json").write_text(json.dumps(content))
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    detections: dict[str, list] = {str(i): [] for i in range(IMAGES)}
    for image, box in zip(image_of.tolist(), boxes.tolist(), strict=True):
        detections[str(image)].append(box)
    (root / "detections.json").write_text(json.dumps(detections))


def measure(root: Path) -> dict[str, float]:
    """Return seconds by step, and GiB at the peak."""
    seconds, start = {}, time.process_time()

    def lap(step: str) -> None:
        nonlocal start
        seconds[step], start = round(time.process_time() - start, 2), time.process_time()

    ds = load_refer(root)
    lap("load_refer")
    assert (len(ds.images), len(ds.annotations), len(ds.expressions)) == (IMAGES, ANNOTATIONS, EXPRESSIONS)
    val = ds.select(split="val")
    lap("select val")
    candidates = ground_truth(ds)
    lap("ground_truth, all splits")
    pairs = pair_up(ds, candidates)
    lap("pair_up, all splits")
    from_boxes(ds, root / "detections.json")
    lap("from_boxes, all splits")
    ds.missing_images()
    lap("missing_images")
    found = pairs.frame().groupby("expression")["iou"].max() > 0.999
    assert 0.9 < found.mean() <= 1 and len(found) == EXPRESSIONS and 0 < len(val.expressions) < len(ds.expressions)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS reports bytes, Linux KiB
    return seconds | {"peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}


def main() -> None:
    if len(sys.argv) > 1:  # the child: its peak is that of reading alone, without the writing
        print(json.dumps(measure(Path(sys.argv[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        megabytes = {path.name: round(path.stat().st_size / 1e6) for path in Path(folder).rglob("*") if path.is_file()}
        result = json.loads(subprocess.check_output([sys.executable, __file__, folder], text=True))
    for step, value in result.items():
        print(f"{step:<42}{value:8.2f}")
    within = result["load_refer"] < LIMIT_SECONDS and result["peak GiB"] < LIMIT_GIB
    print(f"load_refer under {LIMIT_SECONDS} s and {LIMIT_GIB} GiB: {'yes' if within else 'NO'}")
    out = Path(__file__).parent / "results/loader.json"
    out.parent.mkdir(exist_ok=True)
    size = {"images": IMAGES, "annotations": ANNOTATIONS, "expressions": EXPRESSIONS, "megabytes": megabytes}
    report = {"size": size, "measured": result, "within_limits": within, "python": platform.python_version()}
    out.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".tmp").replace(out)
    sys.exit(not within)


if __name__ == "__main__":
    main()
