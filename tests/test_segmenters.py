"""Segmenters on pictures whose parts are known, and SAM by its real pipeline with a tiny random model from disk."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from bsap_utils.regions import from_masks, ground_truth
from bsap_utils.segmenters import felzenszwalb, sam, write_masks


def picture(size=(300, 200)):
    """A noisy ground with a red disc and a striped box."""
    image = Image.new("RGB", size, (70, 110, 60))
    draw = ImageDraw.Draw(image)
    draw.ellipse([30, 40, 110, 120], fill=(200, 40, 40))
    draw.rectangle([180, 60, 259, 159], fill=(40, 60, 200))
    noise = np.random.default_rng(0).normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def truth():
    y, x = np.mgrid[:200, :300]
    disc, box = np.hypot(x - 70, y - 80) <= 40, (x >= 180) & (x < 260) & (y >= 60) & (y < 160)
    return [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in (disc, box)]


def test_felzenszwalb_finds_what_stands_out_first():
    masks, scores = felzenszwalb(picture())
    iou = coco.iou(masks, truth(), [0, 0])
    assert (iou.max(0) > 0.9).all() and set(iou.argmax(0)) <= {0, 1, 2, 3}
    assert (np.diff(scores) <= 0).all() and (scores >= 0).all() and (scores <= 1).all()
    overlaps = coco.iou(masks, masks, [0] * len(masks))
    assert (overlaps[~np.eye(len(masks), dtype=bool)] <= 0.8).all()
    share = np.array([coco.area(mask) for mask in masks]) / (300 * 200)
    assert share.min() >= 0.001 and share.max() <= 0.6
    assert len(felzenszwalb(picture(), top_k=2)[0]) == 2


def test_what_touches_the_edge_is_less_likely_a_thing():
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    image.paste((200, 40, 40), (0, 30, 40, 70))
    image.paste((200, 40, 40), (120, 30, 160, 70))
    masks, scores = felzenszwalb(image)
    left = coco.toBbox(masks)[:, 0]
    assert scores[left < 2].max() < 0.8 * scores[np.abs(left - 120) < 3].max()


def test_felzenszwalb_gives_masks_of_the_image_s_own_size():
    """It works on a smaller copy, so the masks must come back to where things are."""
    large = picture().resize((1200, 800), Image.Resampling.LANCZOS)
    masks, _ = felzenszwalb(large)
    assert {tuple(mask["size"]) for mask in masks} == {(800, 1200)}
    boxes = coco.toBbox(masks)
    assert (np.abs(boxes - [720, 240, 320, 400]).max(1) < 16).any()


@pytest.mark.parametrize("image", [Image.new("L", (40, 30), 128), Image.new("RGB", (7, 300)), Image.new("RGB", (1, 1))])
def test_felzenszwalb_on_nothing_to_see(image):
    masks, scores = felzenszwalb(image)
    assert len(masks) == len(scores)


def test_felzenszwalb_on_the_sample(sample):
    """Good enough to be worth choosing from: most objects have a candidate with IoU > 0.5."""
    val = sample.select(split="val", limit=2)
    best = []
    for image_id, objects in ground_truth(val).groupby("image_id"):
        masks, _ = felzenszwalb(val.load_image(image_id))
        best += coco.iou(masks, objects["segmentation"].tolist(), [0] * len(objects)).max(0).tolist()
    assert np.mean(np.array(best) > 0.5) > 0.6


def test_write_masks_is_read_back_by_from_masks(sample, tmp_path):
    val = sample.select(split="val", limit=2)
    seen = []
    masks = coco.encode(
        np.asfortranarray(
            np.eye(240, 320, dtype=np.uint8)[..., None] + np.arange(3, dtype=np.uint8) > 1, dtype=np.uint8
        )
    )

    def segment(image):
        seen.append(image.size)
        return masks, np.array([0.9, 0.5, 0.123456])

    path = tmp_path / "deep" / "masks.json"
    assert write_masks(val, segment, path) == 6
    frame = from_masks(val, path)
    assert seen == [(320, 240)] * 2 and frame["score"].tolist() == [0.5, 0.1235] * 2
    assert frame["segmentation"].tolist() == masks[1:] * 2
    assert frame.attrs["counts"]["empty masks left out"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["masks.json"]


def test_write_masks_leaves_the_old_file_when_it_fails(sample, tmp_path):
    val = sample.select(split="val", limit=2)
    path = tmp_path / "masks.json"
    path.write_text("old")
    broken = iter([([], np.zeros(0))])
    with pytest.raises(StopIteration):
        write_masks(val, lambda image: next(broken), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["masks.json"]
    assert write_masks(val, lambda image: ([], np.zeros(0)), path) == 0 and json.loads(path.read_text()) == []


@pytest.fixture(scope="module")
def tiny_sam(tmp_path_factory):
    """A random Segment Anything with one layer, whose masks are sharp enough that the pipeline keeps some."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
              "patch_size": 16, "mlp_dim": 16, "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 4}  # fmt: skip
    prompt = {"hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "iou_head_hidden_dim": 8, "iou_head_depth": 2}  # fmt: skip
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    model = transformers.SamModel(config)
    model.mask_decoder.iou_prediction_head.proj_out.bias.data.fill_(1.0)
    for head in model.mask_decoder.output_hypernetworks_mlps:
        head.proj_out.weight.data *= 1e12
        head.proj_out.bias.data *= 1e12
    folder = tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64},
             "mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}  # fmt: skip
    transformers.SamProcessor(transformers.SamImageProcessor(**sizes)).save_pretrained(folder)
    return folder


def test_sam_gives_masks_of_the_image_with_scores(tiny_sam):
    from transformers import pipeline

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    masks, scores = sam(str(tiny_sam), device="cpu", points_per_crop=6)(noise)
    direct = pipeline("mask-generation", model=str(tiny_sam), device="cpu")(noise, points_per_crop=6)
    assert len(masks) == len(scores) == len(direct["masks"]) >= 1
    assert sorted(coco.area(mask) for mask in masks) == sorted(int(np.asarray(mask).sum()) for mask in direct["masks"])
    assert all(mask["size"] == [48, 64] for mask in masks) and (np.diff(scores) <= 0).all()


def test_sam_without_its_package_or_weights_says_what_to_do(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(RuntimeError, match=r"No SAM in 'facebook.*bsap-utils\[sam\]"):
            sam()
    pytest.importorskip("transformers")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{")
    for name in ("nowhere", "damaged"):
        with pytest.raises(RuntimeError, match=f"(?s)No SAM in .*{name}.*pass its folder"):
            sam(str(tmp_path / name))
