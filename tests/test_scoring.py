"""ClipScorer against a plain loop over PIL images, and everything that can go wrong with a model."""

import contextlib
import dataclasses
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from bsap_utils import ROOT, scoring
from bsap_utils.datasets import XYWH, DatasetError
from bsap_utils.evaluation import pick_regions
from bsap_utils.proposals import decode_masks, from_boxes, ground_truth
from bsap_utils.scoring import ClipScorer, ModelError, refer_logits
from bsap_utils.visual_prompts import VISUAL_PROMPTS, show_regions


@pytest.fixture(scope="module")
def few(sample):
    ds = sample.select(split="val")
    images = list(ds.images.index[:5])
    keep = {name: getattr(ds, name)[getattr(ds, name)["image_id"].isin(images)] for name in ("regions", "expressions")}
    return type(ds)(**{**vars(ds), **keep, "images": ds.images.loc[images]})


@pytest.fixture(scope="module")
def tiny(save_clip):
    return ClipScorer(f"local-dir:{save_clip()}", device="cpu", batch_size=7)


def by_hand(scorer, image):
    """One picture through open_clip, with PIL and nothing of ours."""
    (height, width), config = scorer.image_size, scorer.model.visual.preprocess_cfg
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = (pixels - np.array(config["mean"], np.float32)) / np.array(config["std"], np.float32)
    with torch.inference_mode():
        feature = scorer.model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    return feature / feature.norm()


def test_regions_are_encoded_as_a_plain_loop_would(few, scorer):
    regions = ground_truth(few)
    features = scorer.encode_regions(few, regions, ("crop",))
    assert features.shape == (1, len(regions), 64) and features.dtype == torch.float32
    for row, region in enumerate(regions.itertuples()):
        x, y, w, h = region.x, region.y, region.w, region.h
        crop = few.load_image(region.image_id).crop((round(x), round(y), round(x + w), round(y + h)))
        assert torch.dot(features[0, row], by_hand(scorer, crop)) > 0.999


def test_the_order_of_rows_and_the_batch_size_change_nothing(few, tiny, save_clip):
    regions = ground_truth(few)
    features = tiny.encode_regions(few, regions, ("crop", "blur"))
    shuffled = regions.sample(frac=1, random_state=0)
    again = tiny.encode_regions(few, shuffled, ("crop", "blur"))
    assert torch.allclose(again, features[:, shuffled.index.to_numpy()], atol=1e-6)
    tiny_in_one_batch = ClipScorer(tiny.model_name, device="cpu", batch_size=10_000)
    assert torch.allclose(tiny_in_one_batch.encode_regions(few, regions, ("crop", "blur")), features, atol=1e-6)


def test_images_as_pil_and_as_tensors(tiny, few):
    image = few.load_image(few.images.index[0])
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    both = tiny.encode_images([image, tensor, image.convert("L")])
    assert torch.allclose(both[0], both[1]) and torch.allclose(both.norm(dim=1), torch.ones(3))


def test_each_image_is_decoded_once_and_each_text_encoded_once(few, tiny, monkeypatch):
    loads, texts = [], []
    load, encode = type(few).load_image, tiny.model.encode_text
    monkeypatch.setattr(type(few), "load_image", lambda self, i: loads.append(i) or load(self, i))
    monkeypatch.setattr(tiny.model, "encode_text", lambda tokens: texts.append(len(tokens)) or encode(tokens))
    refer_logits([tiny], few, ground_truth(few), ["star", "key", "star"])
    assert sorted(loads) == sorted(set(loads))
    assert sum(texts) == len({t.lower() for t in few.expressions["text"]} | {"star", "key"})


def test_refer_logits_against_a_loop_over_expressions(few, tiny):
    regions = from_boxes(few, ROOT / "data/refshapes/refshapes_dets_dict.json")
    logits = refer_logits([tiny, tiny], few, regions, ["star", "red fish"], ("crop", "blur"))
    features = tiny.encode_regions(few, regions, ("crop", "blur"))
    assert logits.aux.shape == (len(regions), 2)
    seen = 0
    for row, expression in enumerate(few.expressions.itertuples()):
        text = tiny.encode_texts(["a photo of " + expression.text.lower()])[0]
        for region in np.flatnonzero(regions["image_id"] == expression.image_id):
            expected = tiny.logit_scale * (features[0, region] @ text + features[1, region] @ text) / 2
            assert logits.group[region] == logits.expression_group[row]
            assert torch.isclose(logits.query[region, logits.expression_slot[row]], expected, atol=1e-4)
            seen += 1
    assert int(logits.query.isfinite().sum()) == seen, "a slot is filled that no expression stands for"
    aux = tiny.encode_texts(["a photo of star", "a photo of red fish"])
    assert torch.allclose(logits.aux, tiny.logits(features, aux), atol=1e-4)


def test_an_image_without_candidates_is_an_error(few, tiny):
    regions = ground_truth(few)
    short = regions[regions["image_id"] != few.images.index[2]]
    with pytest.raises(DatasetError, match=str(few.images.index[2])):
        refer_logits([tiny], few, short, ["star"])


def test_siglips_bias_is_in_the_logits(save_clip):
    scorer = ClipScorer(f"local-dir:{save_clip(init_logit_bias=-10.0)}", device="cpu")
    features, texts = scorer.encode_texts(["a", "b"]), scorer.encode_texts(["c"])
    assert scorer.logit_bias == -10
    assert torch.allclose(scorer.logits(features, texts), scorer.logit_scale * features @ texts.T - 10)


def test_truncation_is_said_once_with_its_count(tiny):
    long = ["star " * 40, "fish " * 40, "key"]
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than the 16 tokens") as said:
        tiny.encode_texts(long)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode_texts(long)
        tiny.encode_texts(["star " * 14])  # 14 words and the two marks just fit


def test_the_quick_path_agrees_with_pils(sample, scorer):
    """Fidelity on the whole val split: features nearly the same, and the same region picked."""
    ds = sample.select(split="val")
    regions = from_boxes(ds, ROOT / "data/refshapes/refshapes_dets_dict.json")
    quick, exact = (scorer.encode_regions(ds, regions, exact=exact) for exact in (False, True))
    assert (quick * exact).sum(-1).mean(1).min() >= 0.999
    picks = []
    for features in (quick, exact):
        logits = refer_logits([scorer], ds, regions, ["star"], features=[features])
        picks.append(pick_regions(logits.query, logits.group)[logits.expression_group, logits.expression_slot])
    assert (picks[0] == picks[1]).float().mean() >= 0.99


def test_readers_work_ahead_in_order_but_not_without_bound():
    begun = []
    results = scoring.prefetch(lambda item: begun.append(item) or -item, iter(range(1000)), threads=2)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    time.sleep(0.2)  # as long as the threads like: they must not run on
    assert len(begun) <= 12
    assert list(results) == [-item for item in range(3, 1000)]


def test_what_fails_in_a_reader_reaches_the_caller(few, tiny, tmp_path):
    shutil.copytree(few.image_root, tmp_path / "images")
    spoiled = tmp_path / "images" / few.images["file_name"].iloc[3]
    spoiled.write_bytes(spoiled.read_bytes()[:500])
    with pytest.raises(DatasetError, match=spoiled.name):
        tiny.encode_regions(dataclasses.replace(few, image_root=tmp_path / "images"), ground_truth(few))


def test_too_little_memory_halves_the_batch_and_loses_nothing(few, tiny, save_clip, monkeypatch):
    small = ClipScorer(tiny.model_name, device="cpu", batch_size=64)
    encode, sizes = small.model.encode_image, []

    def limited(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 10:
            raise torch.OutOfMemoryError("no memory")
        return encode(pixels)

    monkeypatch.setattr(small.model, "encode_image", limited)
    regions = ground_truth(few)
    assert torch.allclose(small.encode_regions(few, regions), tiny.encode_regions(few, regions), atol=1e-6)
    assert small.batch_size == 8 and sizes[:4] == [64, 32, 16, 8]
    monkeypatch.setattr(
        small.model, "encode_image", lambda pixels: (_ for _ in ()).throw(torch.OutOfMemoryError("none"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        small.encode_images([few.load_image(few.images.index[0])])


def test_torchvisions_decoder_gives_pils_pixels(sample, tmp_path):
    """Where there is no GPU, this is all that can be seen of the path with nvJPEG."""
    path = sample.image_path(sample.images.index[0])
    pixels = scoring.decode_jpeg(path, "cpu")
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(sample.load_image(sample.images.index[0]))).all()
    (tmp_path / "half.jpg").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RuntimeError):
        scoring.decode_jpeg(tmp_path / "half.jpg", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_for_it_once_an_image_and_features_agree(sample, scorer):
    ds = sample.select(split="val", limit=20)
    regions, prompts = ground_truth(ds), tuple(name for name in VISUAL_PROMPTS if name != "global_local")
    masks = scoring._segmentations(ds, regions, prompts)
    image = scoring.read_image(ds, ds.images.index[0], "cuda")
    rows = regions.index[regions["image_id"] == ds.images.index[0]]
    boxes = torch.tensor(regions.loc[rows, XYWH].to_numpy(np.float32))
    of_image = torch.from_numpy(decode_masks(masks[rows], *image.shape[1:])).cuda()
    show_regions(image, boxes, prompts, 64, of_image)
    torch.cuda.set_sync_debug_mode("error")
    try:
        show_regions(image, boxes, prompts, 64, of_image)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = scorer.encode_regions(ds, regions, prompts)
    for precision in ("fp32", "bf16"):
        on_gpu = ClipScorer(scorer.model_name, device="cuda", precision=precision).encode_regions(ds, regions, prompts)
        assert (on_cpu * on_gpu).sum(-1).mean(1).min() >= 0.999


def test_weights_hash_follows_the_weights(tiny, save_clip):
    same = ClipScorer(tiny.model_name, device="cpu")
    assert same.weights_hash() == tiny.weights_hash()
    with torch.no_grad():
        next(same.model.parameters()).add_(1e-3)
    assert same.weights_hash() != tiny.weights_hash()


def test_device_and_precision():
    assert scoring.pick_device("cpu").type == "cpu"
    assert scoring.pick_precision("auto", torch.device("cpu")) == "fp32"
    assert scoring.pick_precision("bf16", torch.device("cpu")) == "bf16"


def test_bf16_agrees_with_fp32(few, scorer):
    regions = ground_truth(few)
    half = ClipScorer(scorer.model_name, device="cpu", precision="bf16")
    a, b = (s.encode_regions(few, regions, ("crop", "blur")) for s in (scorer, half))
    assert float((a * b).sum(-1).mean()) > 0.999


# Masks, and Global-Local CLIP


FOUR_BLOCKS = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 4}


@pytest.fixture(scope="module")
def deep(save_clip):
    return ClipScorer(f"local-dir:{save_clip(vision_cfg=FOUR_BLOCKS)}", device="cpu", batch_size=7)


def class_token_without(visual, pixels, keep, from_block):
    """The slow way: drop the tokens. Returns the feature of one region."""
    with torch.inference_mode():
        tokens = visual.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([visual.class_embedding.expand(1, 1, -1), tokens], 1) + visual.positional_embedding
        tokens = visual.ln_pre(tokens)
        for number, block in enumerate(visual.transformer.resblocks):
            if number == from_block:
                tokens = torch.cat([tokens[:, :1], tokens[:, 1:][:, keep]], 1)
            tokens = block(tokens)
        return (visual.ln_post(tokens[:, 0]) @ visual.proj)[0]


@pytest.mark.parametrize("from_block", [0, 2, 3])
def test_hidden_patches_are_as_if_they_were_dropped(deep, from_block):
    generator = torch.Generator().manual_seed(0)
    pixels, keep = torch.randn(1, 3, 32, 32, generator=generator), torch.rand(9, 64, generator=generator) < 0.4
    keep[0], keep[1] = True, False  # all patches, and none: the class token alone
    visual = deep.model.visual
    with torch.inference_mode():
        features = scoring.encode_masked(visual, pixels, keep, from_block)
        plain = visual(pixels)[0]
    for mask, feature in zip(keep, features, strict=True):
        assert torch.allclose(feature, class_token_without(visual, pixels, mask, from_block), atol=1e-5)
    assert torch.allclose(features[0], plain, atol=1e-5)
    assert (features[1:] - plain).abs().max(1).values.min() > 1e-3
    with torch.inference_mode():
        assert torch.equal(visual(pixels)[0], plain), "a hook was left behind"


def test_the_class_token_cannot_see_hidden_patches(deep):
    keep = torch.zeros(1, 8, 8, dtype=torch.bool)
    keep[:, 2:5, 3:7] = True
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    feature = scoring.encode_masked(deep.model.visual, pixels, keep.flatten(1), from_block=0)
    (gradient,) = torch.autograd.grad(feature.square().sum(), pixels)
    seen = gradient[0].abs().sum(0).reshape(8, 4, 8, 4).sum((1, 3)) > 0
    assert torch.equal(seen, keep[0])


def test_blocks_that_are_not_there(deep):
    for block in (-1, 4):
        with pytest.raises(ValueError, match="blocks 0 to 3"):
            scoring.encode_masked(deep.model.visual, torch.zeros(1, 3, 32, 32), torch.ones(1, 64).bool(), block)


def test_global_local_by_hand(few, deep):
    regions = ground_truth(few).sample(frac=1, random_state=0)  # rows of an image apart, more of them than a batch
    features = deep.encode_regions(few, regions, ("crop", "global_local", "mask_crop"), global_weight=0.85)
    others = deep.encode_regions(few, regions, ("crop", "mask_crop"))
    assert torch.allclose(features[[0, 2]], others, atol=1e-6)
    visual = deep.model.visual
    mean, std = (torch.tensor(visual.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))

    def pixels(image):
        array = torch.from_numpy(np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).copy())
        return (array.permute(2, 0, 1)[None] / 255 - mean) / std

    for row, region in enumerate(regions.head(12).itertuples()):
        image, rle = few.load_image(region.image_id), region.segmentation
        mask = coco.decode(rle).astype(bool)
        coverage = mask.reshape(8, 30, 8, 40).mean((1, 3)).flatten()
        keep = torch.from_numpy(coverage >= coverage.max() / 2)
        x, y, w, h = round(region.x), round(region.y), round(region.w), round(region.h)
        cut = Image.composite(image, Image.new("RGB", image.size, (123, 117, 104)), Image.fromarray(mask))
        with torch.inference_mode():
            local = visual(pixels(cut.crop((x, y, x + w, y + h))))[0]
        expected = 0.85 * class_token_without(visual, pixels(image), keep, 3) + 0.15 * local
        assert torch.cosine_similarity(features[1, row], expected, dim=0) > 0.9995
        assert torch.isclose(features[1, row].norm(), torch.tensor(1.0))
    assert (features[1] - features[2]).abs().max() > 0.01


def test_a_whole_image_without_segmentation_is_its_plain_feature(few, deep):
    whole = from_boxes(few, ROOT / "data/refshapes/refshapes_dets_dict.json").groupby("image_id").head(1)
    whole = whole.assign(x=0.0, y=0.0, w=320.0, h=240.0, segmentation=None)
    features = deep.encode_regions(few, whole, ("global_local",), global_weight=1.0)[0]
    plain = deep.encode_images([few.load_image(image_id) for image_id in whole["image_id"]])
    assert torch.allclose(features, plain, atol=1e-5)


@pytest.mark.parametrize("prompt", ["mask_blur", "global_local"])
def test_candidates_without_a_segmentation_are_an_error_when_masks_are_shown(few, deep, prompt):
    boxes = from_boxes(few, ROOT / "data/refshapes/refshapes_dets_dict.json")
    with pytest.raises(DatasetError, match=rf"{len(boxes)} of {len(boxes)} .*which {prompt} needs.*ground_truth"):
        deep.encode_regions(few, boxes, ("crop", prompt))
    some = ground_truth(few)
    some.at[3, "segmentation"] = None
    with pytest.raises(DatasetError, match=f"1 of {len(some)} .*image {some.at[3, 'image_id']}"):
        deep.encode_regions(few, some, (prompt,))


def test_a_damaged_mask_is_an_error_that_names_the_image(few, deep):
    regions = ground_truth(few)
    regions.at[2, "segmentation"] = {"size": [240, 321], "counts": [240 * 321]}
    with pytest.raises(DatasetError, match=rf"Image {regions.at[2, 'image_id']}: .*RLE of size \[240, 321\]"):
        deep.encode_regions(few, regions, ("mask_crop",))


def test_masks_are_decoded_for_prompts_that_show_them_and_one_image_at_a_time(few, deep, monkeypatch):
    decoded, decode = [], scoring.decode_masks
    monkeypatch.setattr(
        scoring, "decode_masks", lambda *arguments: decoded.append(len(arguments[0])) or decode(*arguments)
    )
    regions = ground_truth(few)
    deep.encode_regions(few, regions, ("crop", "circle_blur"))
    assert not decoded
    deep.encode_regions(few, regions, ("mask_blur", "mask_crop", "global_local"))
    assert sorted(decoded) == sorted(regions.groupby("image_id").size())


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"embed_dim": 16, "vision_cfg": RESNET}, "ModifiedResNet"),
        ({"vision_cfg": {**FOUR_BLOCKS, "pool_type": "avg"}}, "VisionTransformer"),
        ({"vision_cfg": {**FOUR_BLOCKS, "attentional_pool": True}}, "VisionTransformer"),
        ({"vision_cfg": {**FOUR_BLOCKS, "block_type": "custom"}}, "VisionTransformer"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}}, "TimmModel"),
    ],
)
def test_global_local_refuses_models_without_patch_tokens_by_name(few, save_clip, changes, name):
    scorer = ClipScorer(f"local-dir:{save_clip(**changes)}", device="cpu")
    with pytest.raises(
        ModelError, match=f"'global_local' .*{scorer.model_name}, {name}, has no class token.*mask_crop"
    ):
        scorer.encode_regions(few, ground_truth(few), ("global_local",))
    assert scorer.encode_regions(few, ground_truth(few).head(3), ("mask_crop",)).shape[:2] == (1, 3)


# Head noun phrases


PARSED = [  # words, parts of speech, heads, dependencies
    ("the man left of a car", "DET NOUN ADJ ADP DET NOUN", [1, 1, 1, 2, 5, 3], "det ROOT amod prep det pobj"),
    ("big red dog on the sofa", "ADJ ADJ NOUN ADP DET NOUN", [2, 2, 2, 2, 5, 3], "amod amod ROOT prep det pobj"),
    ("left of the tree", "ADV ADP DET NOUN", [0, 0, 3, 1], "ROOT prep det pobj"),
    ("he sits there", "PRON VERB ADV", [1, 1, 1], "nsubj ROOT advmod"),
]


@pytest.fixture(scope="module")
def english_parser(tmp_path_factory):
    """A real spaCy model, trained here on four sentences and installed as a package: they are all that it knows."""
    spacy = pytest.importorskip("spacy")
    from spacy.training import Example

    spacy.util.fix_random_seed(0)
    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer")
    nlp.add_pipe("parser", config={"min_action_freq": 1})
    examples = []
    for words, pos, heads, deps in PARSED:
        annotation = {"words": words.split(), "pos": pos.split(), "heads": heads, "deps": deps.split()}
        examples.append(Example.from_dict(nlp.make_doc(words), annotation))
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(40):
        nlp.update(examples, sgd=optimizer)
    nlp.meta.update(lang="en", name="core_web_md", version="0.1.0")
    site = tmp_path_factory.mktemp("site")
    package, record = site / "en_core_web_md", site / "en_core_web_md-0.1.0.dist-info"
    package.mkdir()
    nlp.to_disk(package / "en_core_web_md-0.1.0")
    shutil.copy(package / "en_core_web_md-0.1.0" / "meta.json", package)
    load = (
        "from spacy.util import load_model_from_init_py\ndef load(**o): return load_model_from_init_py(__file__, **o)\n"
    )
    (package / "__init__.py").write_text(load)
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: en_core_web_md\nVersion: 0.1.0\n")
    return site


def test_head_noun_phrases_are_those_of_the_root(english_parser, monkeypatch):
    monkeypatch.syspath_prepend(english_parser)
    phrases, parser = scoring.noun_phrases([words for words, *_ in PARSED])
    assert parser == "spaCy en_core_web_md 0.1.0"
    assert phrases == ["the man", "big red dog", "left of the tree", "he"]


def test_without_a_parser_the_expressions_stay_and_it_is_said(monkeypatch):
    texts = ["the man left of a car", "dog"]
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert scoring.noun_phrases(texts) == (texts, "none: spaCy is not installed")


def test_without_a_model_the_expressions_stay_and_it_is_said():
    spacy = pytest.importorskip("spacy")
    if spacy.util.get_installed_models():
        pytest.skip("spaCy has a model here")
    phrases, parser = scoring.noun_phrases(["the man left of a car"])
    assert phrases == ["the man left of a car"] and "spacy download" in parser


def test_head_nouns_are_mixed_into_the_expressions_and_not_into_the_auxiliary_prompts(few, tiny, monkeypatch):
    regions = ground_truth(few)
    plain = refer_logits([tiny], few, regions, ["star"], ("crop",))
    assert plain.noun_parser == ""
    monkeypatch.setattr(scoring, "noun_phrases", lambda texts: ([text.split()[-1] for text in texts], "last word"))
    mixed = refer_logits([tiny], few, regions, ["star"], ("crop",), head_noun_weight=0.3)
    assert mixed.noun_parser == "last word"
    assert torch.equal(mixed.aux, plain.aux)
    features = tiny.encode_regions(few, regions, ("crop",))[0]
    for row, text in enumerate(few.expressions["text"].str.lower()):
        both = tiny.encode_texts([f"a photo of {text}", f"a photo of {text.split()[-1]}"])
        feature = 0.3 * both[0] + 0.7 * both[1]
        own = mixed.group == mixed.expression_group[row]
        expected = tiny.logit_scale * features[own] @ (feature / feature.norm())
        assert torch.allclose(mixed.query[own, mixed.expression_slot[row]], expected, atol=1e-4)


def test_refer_logits_hands_the_global_weight_on(few, deep):
    regions = ground_truth(few)
    logits = refer_logits([deep], few, regions, ["star"], ("global_local",), global_weight=0.4)
    features = deep.encode_regions(few, regions, ("global_local",), global_weight=0.4)
    assert torch.allclose(logits.aux, deep.logits(features, deep.encode_texts(["a photo of star"])), atol=1e-4)


# What can go wrong with a model


@pytest.mark.parametrize(
    ("model", "pretrained", "said"),
    [
        ("ViT-B-33", "openai", "ViT-B-32"),
        ("ViT-B-32", "laion2b", "laion2b_s34b_b79k"),
        ("ViT-B-32", "", "random network"),
        ("ViT-B-32", "checkpoints/mine.pt", "no such checkpoint file"),
        ("ViT-B-32", "metaclip_400m", "ViT-B-32-quickgelu"),
        ("local-dir:nowhere", "", "open_clip_config.json"),
    ],
)
def test_errors_name_what_is_wrong_and_what_to_do(model, pretrained, said):
    with pytest.raises(ModelError, match=said):
        ClipScorer(model, pretrained, device="cpu")


def test_a_folder_without_weights_is_an_error_not_a_random_network(save_clip):
    with pytest.raises(ModelError, match="could not be loaded"):
        ClipScorer(f"local-dir:{save_clip(weights=False)}", device="cpu")


def test_damaged_weights_are_an_error(save_clip):
    folder = save_clip()
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="Check that the file is whole"):
        ClipScorer(f"local-dir:{folder}", device="cpu")


def test_a_checkpoint_file(tmp_path):
    name = "ViT-S-32-alt"  # the smallest that open_clip lists
    torch.manual_seed(1)
    model = open_clip.create_model(name, load_weights=False)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pt")
    scorer = ClipScorer(name, str(tmp_path / "mine.pt"), device="cpu")
    assert torch.allclose(scorer.model.visual.conv1.weight, model.visual.conv1.weight)


SCORE = """
import sys
from bsap_utils.scoring import ClipScorer
print(ClipScorer(*sys.argv[1:], device="cpu").encode_texts(["star"]).shape)
"""


def run(arguments, cache, endpoint):
    environment = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", SCORE, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("arguments", [["ViT-B-32", "openai"], ["hf-hub:someone/some-clip"]])
def test_no_hub_fails_after_one_try_and_says_what_to_download(arguments, tmp_path):
    """The hub's own client goes on trying for half a minute; ours asks once. Here a port counts who knocks."""
    knocks = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    knocks.append(door.accept()[0])
                    knocks[-1].close()

        threading.Thread(target=hang_up, daemon=True).start()
        done = run(arguments, tmp_path, f"http://127.0.0.1:{door.getsockname()[1]}")
        door.shutdown(socket.SHUT_RDWR)
    assert done.returncode != 0 and len(knocks) == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "cannot be reached" in message and "download open_clip" in message
    assert str(tmp_path) in message and "local-dir:data/clip-refshapes" in message


@pytest.fixture
def hub(save_clip, tmp_path):
    """A hub on this machine, which serves one repository as the real one does; counts its requests."""
    folder, requests = save_clip(), []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            file = folder / self.path.rpartition("/")[2]
            if "/local/tiny/resolve/" not in self.path or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                return
            body = file.read_bytes()
            self.send_response(200)
            for name, value in (
                ("ETag", f'"{len(body)}"'),
                ("X-Repo-Commit", "a" * 40),
                ("Content-Length", str(len(body))),
            ):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    shutil.rmtree(folder)


def test_a_model_from_a_hub_and_then_from_its_cache_without_one(hub, tmp_path):
    address, requests = hub
    first = run(["hf-hub:local/tiny"], tmp_path, address)
    assert "torch.Size([1, 16])" in first.stdout, first.stderr
    assert any(path.endswith("open_clip_model.safetensors") for path in requests)
    second = run(["hf-hub:local/tiny"], tmp_path, "http://127.0.0.1:9")
    assert "torch.Size([1, 16])" in second.stdout, second.stderr


def test_a_repository_without_weights_is_an_error(hub, tmp_path):
    address, _ = hub
    done = run(["hf-hub:local/absent"], tmp_path, address)
    assert done.returncode != 0 and "could not be loaded" in done.stderr.strip().splitlines()[-1]
