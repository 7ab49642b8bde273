"""ClipScorer against a plain loop over PIL images: what is encoded, how often, and the logits of it."""

import dataclasses
import json
import shutil
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco

from bsap_utils import ROOT, global_local, scoring
from bsap_utils.datasets import DatasetError
from bsap_utils.regions import load_candidates, pair_up, whole_images
from bsap_utils.scoring import ClipScorer, ModelError, load_scorer


@pytest.fixture(scope="module")
def tiny(save_clip):
    return ClipScorer(f"local-dir:{save_clip()}", device="cpu", batch_size=7, cache=False)


def by_hand(scorer, image):
    """One picture through open_clip, with PIL and nothing of ours."""
    (height, width), config = scorer.image_size, scorer.model.visual.preprocess_cfg
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = (pixels - np.array(config["mean"], np.float32)) / np.array(config["std"], np.float32)
    with torch.inference_mode():
        feature = scorer.model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    return feature / feature.norm()


def test_crop_and_blur_are_what_pil_makes_and_the_same_regions_are_picked(sample_val, scorer):
    """Fidelity: every view that ReCLIP's code would show of 60 images, one at a time, against ours."""
    ds = sample_val.select(limit=60)
    candidates = load_candidates(ds, "detections", "data/refshapes")
    views = []
    for row in candidates.itertuples():
        image = ds.load_image(row.image_id)
        box = round(row.x), round(row.y), round(row.x + row.w), round(row.y + row.h)
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill=255)
        blurred = Image.composite(image, image.filter(ImageFilter.GaussianBlur(100)), mask)
        views += [view.resize(scorer.image_size[::-1], Image.Resampling.BICUBIC) for view in (image.crop(box), blurred)]
    exact = scorer.encode_images(views).view(len(candidates), 2, -1).transpose(0, 1)
    ours = scorer.encode_regions(ds, candidates)
    assert (ours * exact).sum(-1).mean(1).min() >= 0.999
    pairs, text = pair_up(ds, candidates), scorer.encode_texts(ds.expressions["text"], "a photo of {}")
    starts = np.flatnonzero(np.diff(pairs.expression.numpy()))
    picks = [
        [part.argmax() for part in np.split(scorer.pair_logits(features, text, pairs).numpy(), starts + 1)]
        for features in (ours, exact)
    ]
    assert len(picks[0]) == len(ds.expressions) and np.mean(np.equal(*picks)) >= 0.99


def test_the_order_of_rows_and_the_batch_size_change_nothing(few, regions, tiny):
    features = tiny.encode_regions(few, regions)
    shuffled = regions.sample(frac=1, random_state=0)
    again = tiny.encode_regions(few, shuffled)
    assert features.shape == (2, len(regions), 16) and torch.allclose(
        features.norm(dim=-1), torch.ones(2, len(regions))
    )
    assert torch.allclose(again, features[:, shuffled.index.tolist()], atol=1e-6)
    in_one_batch = ClipScorer(tiny.model_name, device="cpu", batch_size=10_000, cache=False)
    assert torch.allclose(in_one_batch.encode_regions(few, regions), features, atol=1e-6)


def test_images_as_paths_bytes_pil_and_tensors_in_their_order(tiny, few):
    paths = [few.image_path(image_id) for image_id in few.images.index]
    image = few.load_image(few.images.index[0])
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    kinds = tiny.encode_images([paths[0], str(paths[0]), paths[0].read_bytes(), image, tensor])
    assert torch.allclose(kinds, by_hand(tiny, image).expand(5, -1), atol=1e-2)
    assert (kinds - kinds[0]).abs().max() < 1e-6
    small = ClipScorer(tiny.model_name, device="cpu", batch_size=1, cache=False)
    assert torch.allclose(small.encode_images(paths * 7), tiny.encode_images(paths).repeat(7, 1), atol=1e-6)


def test_a_lying_photo_is_turned_upright_and_16_bits_are_not_white(tiny, few, tmp_path):
    upright, exif = few.load_image(few.images.index[0]), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    grey = np.asarray(upright.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    found = tiny.encode_images([tmp_path / "phone.png", tmp_path / "deep.png"])
    expected = tiny.encode_images([upright, Image.fromarray(grey)])
    assert torch.allclose(found, expected, atol=1e-6)


def test_each_image_is_decoded_once_and_each_distinct_text_encoded_once(few, regions, save_clip, monkeypatch):
    scorer = ClipScorer(f"local-dir:{save_clip()}", device="cpu", cache=False)
    loads, texts = [], []
    load, encode = type(few).load_image, scorer.model.encode_text
    monkeypatch.setattr(type(few), "load_image", lambda self, i: loads.append(i) or load(self, i))
    monkeypatch.setattr(scorer.model, "encode_text", lambda tokens: texts.append(len(tokens)) or encode(tokens))
    scorer.encode_regions(few, regions, ("crop", "blur", "mask_gray"))
    assert sorted(loads) == sorted(few.images.index)
    first = scorer.encode_texts(["Star", "key", "star"], "a photo of {}")
    again = scorer.encode_texts(["key", "a photo of star"])
    assert texts == [2, 1] and torch.equal(first[0], first[2]) and torch.equal(first[0], again[1])


def test_logits_of_pairs_against_a_loop(few, tiny):
    candidates = load_candidates(few, "detections", "data/refshapes")
    pairs = pair_up(few, candidates)
    image, text = tiny.encode_regions(few, candidates), tiny.encode_texts(few.expressions["text"], "a photo of {}")
    found, table = tiny.pair_logits(image, text, pairs), tiny.logits(image, text)
    for pair in range(0, len(pairs), 7):
        candidate, expression = int(pairs.candidate[pair]), int(pairs.expression[pair])
        expected = (
            tiny.logit_scale * (image[0, candidate] @ text[expression] + image[1, candidate] @ text[expression]) / 2
        )
        assert torch.isclose(found[pair], expected, atol=1e-4) and torch.isclose(
            table[candidate, expression], expected, atol=1e-4
        )
    assert torch.allclose(
        tiny.pair_logits(image[0], text, pairs),
        tiny.logits(image[0], text)[pairs.candidate, pairs.expression],
        atol=1e-4,
    )


def test_siglips_bias_is_in_the_logits(save_clip):
    scorer = ClipScorer(f"local-dir:{save_clip(init_logit_bias=-10.0)}", device="cpu", cache=False)
    features, texts = scorer.encode_texts(["a", "b"]), scorer.encode_texts(["c"])
    assert torch.allclose(scorer.logits(features, texts), scorer.logit_scale * features @ texts.T - 10)


def test_the_logits_of_an_ensemble_are_the_mean_of_its_models(few, regions, tiny, save_clip):
    other = save_clip(embed_dim=24, init_logit_scale=1.0, init_logit_bias=-3.0)
    both = load_scorer([tiny.model_name, f"local-dir:{other}"], device="cpu", cache=False)
    pairs, texts = pair_up(few, regions), few.expressions["text"]
    image, text = both.encode_regions(few, regions), both.encode_texts(texts, template="a photo of {}")
    assert torch.allclose(image.norm(dim=-1), torch.ones(2, len(regions)))
    alone = [
        one.pair_logits(one.encode_regions(few, regions), one.encode_texts(texts, "a photo of {}"), pairs)
        for one in both.scorers
    ]
    assert torch.allclose(both.pair_logits(image, text, pairs), (alone[0] + alone[1]) / 2, atol=1e-4)
    assert both.encode_images([few.image_path(few.images.index[0])]).shape == (1, 40)
    alone = load_scorer(tiny.model_name, device="cpu")
    assert isinstance(alone, ClipScorer) and alone.pretrained == ""  # a folder has weights of its own
    with pytest.raises(ModelError, match="3 models and 2 pretrained"):
        load_scorer(["a", "b", "c"], ["x", "y"])


def test_truncation_is_said_once_with_its_count(tiny):
    long = ["star " * 40, "fish " * 40, "key", "mug"]
    with pytest.warns(UserWarning, match="2 of 4 texts are too long for the model: cut off") as said:
        tiny.encode_texts(long)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode_texts(long)
        tiny.encode_texts(["star " * 14])  # 14 words and the two marks just fit


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_its_place_is_refused(tiny, template):
    with pytest.raises(ValueError, match="template"):
        tiny.encode_texts(["star"], template)


def test_text_with_braces_is_text(tiny):
    assert torch.equal(tiny.encode_texts(["{0} {x}"], "a {}"), tiny.encode_texts(["a {0} {x}"]))


def test_threads_work_one_group_ahead_and_no_further():
    begun = []
    results = scoring.ahead(lambda item: begun.append(item) or -item, ([i, i + 1] for i in range(0, 1000, 2)))
    assert next(results) == [0, -1] and next(results) == [-2, -3]
    time.sleep(0.1)  # as long as the threads like: they must not run on
    assert len(begun) <= 6
    assert sum(results, []) == [-item for item in range(4, 1000)]


def test_what_fails_in_a_reader_reaches_the_caller(few, regions, tiny, tmp_path):
    shutil.copytree(few.image_root, tmp_path / "images")
    spoiled = tmp_path / "images" / few.images["file_name"].iloc[3]
    spoiled.write_bytes(spoiled.read_bytes()[:500])
    moved = dataclasses.replace(few, image_root=tmp_path / "images")
    with pytest.raises(DatasetError, match=spoiled.name):
        tiny.encode_regions(moved, regions)
    spoiled.unlink()
    with pytest.raises(DatasetError, match=f"1 images are not in .*{spoiled.name}.*bsap data get"):
        tiny.encode_regions(moved, regions)


def test_no_candidates_have_no_features_and_unknown_prompts_are_said(few, regions, tiny):
    assert tiny.encode_regions(few, regions.head(0)).shape == (2, 0, 16)
    with pytest.raises(RuntimeError, match="non-empty"):
        tiny.encode_regions(few, regions, [])
    with pytest.raises(ValueError, match="halo.*mask_crop"):
        tiny.encode_regions(few, regions, ("halo",))
    with pytest.raises(ValueError, match="'red star' would be taken as 8 texts"):
        tiny.encode_texts("red star")


def test_too_little_memory_halves_the_batch_and_loses_nothing(few, regions, tiny, monkeypatch):
    small = ClipScorer(tiny.model_name, device="cpu", batch_size=64, cache=False)
    encode, sizes = small.model.encode_image, []

    def limited(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 10:
            raise torch.OutOfMemoryError("no memory")
        return encode(pixels)

    monkeypatch.setattr(small.model, "encode_image", limited)
    assert torch.allclose(small.encode_regions(few, regions), tiny.encode_regions(few, regions), atol=1e-6)
    assert small.batch_size == 8 and max(sizes) <= 64 and sizes[-1] <= 8
    monkeypatch.setattr(
        small.model, "encode_image", lambda pixels: (_ for _ in ()).throw(torch.OutOfMemoryError("none"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        small.encode_images([few.load_image(few.images.index[0])])


def test_torchvisions_decoder_gives_pils_pixels(sample):
    """Where there is no GPU, this is all that can be seen of the path with nvJPEG."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    path = sample.image_path(sample.images.index[0])
    pixels = decode_jpeg(read_file(str(path)), ImageReadMode.RGB)
    assert torch.equal(pixels, scoring.read_image(sample, sample.images.index[0]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees_with_fp32(few, regions, scorer, precision):
    half = ClipScorer(scorer.model_name, device="cpu", precision=precision, cache=False)
    a, b = (one.encode_regions(few, regions) for one in (scorer, half))
    assert float((a * b).sum(-1).mean()) > 0.999
    assert float((scorer.encode_texts(["key"]) * half.encode_texts(["key"])).sum()) > 0.999


# Masks, and Global-Local CLIP

FOUR_BLOCKS = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 4}


@pytest.fixture(scope="module")
def deep(save_clip):
    return ClipScorer(f"local-dir:{save_clip(vision_cfg=FOUR_BLOCKS)}", device="cpu", batch_size=7, cache=False)


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


@pytest.mark.parametrize(("layers", "from_block"), [(1, 0), (4, 3), (8, 6)])
def test_hidden_patches_are_as_if_they_were_dropped(save_clip, layers, from_block):
    tower = {**FOUR_BLOCKS, "layers": layers}
    deep = ClipScorer(f"local-dir:{save_clip(vision_cfg=tower)}", device="cpu", cache=False)
    generator = torch.Generator().manual_seed(0)
    pixels, keep = torch.randn(1, 3, 32, 32, generator=generator), torch.rand(9, 64, generator=generator) < 0.4
    keep[0], keep[1] = True, False  # all patches, and none: the class token alone
    visual = deep.model.visual
    with torch.inference_mode():
        features = global_local.encode_masked(visual, pixels, keep)
        plain = visual(pixels)[0]
    for mask, feature in zip(keep, features, strict=True):
        assert torch.allclose(feature, class_token_without(visual, pixels, mask, from_block), atol=1e-5)
    assert torch.allclose(features[0], plain, atol=1e-5)
    assert (features[1:] - plain).abs().max(1).values.min() > 1e-3
    with torch.inference_mode():
        assert torch.equal(visual(pixels)[0], plain), "a hook was left behind"


def test_global_local_by_hand(few, regions, deep):
    rows = regions.sample(frac=1, random_state=0)  # rows of an image apart, more of them than a batch
    features = deep.encode_regions(few, rows, ("crop", "global_local", "mask_crop"), global_weight=0.85)
    assert torch.allclose(features[[0, 2]], deep.encode_regions(few, rows, ("crop", "mask_crop")), atol=1e-6)
    visual = deep.model.visual
    mean, std = (torch.tensor(visual.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))

    def pixels(image):
        array = torch.from_numpy(np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).copy())
        return (array.permute(2, 0, 1)[None] / 255 - mean) / std

    for row, region in enumerate(rows.head(12).itertuples()):
        image, mask = few.load_image(region.image_id), coco.decode(region.segmentation).astype(bool)
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
    default, of_refcoco = (deep.encode_regions(few, rows[:3], ("global_local",), *w) for w in ((), (0.95,)))
    assert torch.equal(default, of_refcoco)


def test_a_whole_image_with_its_whole_mask_is_its_plain_feature(few, deep):
    size = {"size": [240, 320], "counts": [0, 240 * 320]}
    whole = whole_images(few)
    whole["segmentation"] = [size] * len(whole)
    features = deep.encode_regions(few, whole, ("global_local",), global_weight=1.0)[0]
    plain = deep.encode_images([few.image_path(image_id) for image_id in whole["image_id"]])
    assert torch.allclose(features, plain, atol=1e-5)


@pytest.mark.parametrize("prompt", ["mask_blur", "global_local"])
def test_candidates_without_a_mask_are_an_error_where_masks_are_shown(few, regions, deep, prompt):
    boxes = load_candidates(few, "detections", "data/refshapes")
    with pytest.raises(DatasetError, match=f"without a mask, which .*{prompt}.* need.*gt or masks"):
        deep.encode_regions(few, boxes, ("crop", prompt))
    some = regions.copy()
    some.at[3, "segmentation"] = None
    with pytest.raises(DatasetError, match="without a mask"):
        deep.encode_regions(few, some, (prompt,))


def test_masks_are_decoded_for_prompts_that_show_them_and_once_an_image(few, regions, deep, monkeypatch):
    decoded, decode = [], scoring.decode_masks
    monkeypatch.setattr(scoring, "decode_masks", lambda *args: decoded.append(len(args[0])) or decode(*args))
    deep.encode_regions(few, regions, ("crop", "circle_blur"))
    assert not decoded
    deep.encode_regions(few, regions, ("mask_blur", "mask_crop", "global_local"))
    assert sorted(decoded) == sorted(regions.groupby("image_id").size())


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


@pytest.mark.parametrize(
    "tower", [RESNET, {**FOUR_BLOCKS, "pool_type": "avg"}, {**FOUR_BLOCKS, "attentional_pool": True}]
)
def test_global_local_refuses_models_without_patch_tokens_by_name(few, regions, save_clip, tower):
    scorer = ClipScorer(f"local-dir:{save_clip(vision_cfg=tower)}", device="cpu", cache=False)
    with pytest.raises(ModelError, match=f"'global_local' .*{scorer.model_name} has no class token"):
        scorer.encode_regions(few, regions, ("global_local",))
    assert scorer.encode_regions(few, regions.head(3), ("mask_crop",)).shape[:2] == (1, 3)


# Head noun phrases

PARSED = [  # words, parts of speech, heads, dependencies
    ("the man left of a car", "DET NOUN ADJ ADP DET NOUN", [1, 1, 1, 2, 5, 3], "det ROOT amod prep det pobj"),
    ("big red dog on the sofa", "ADJ ADJ NOUN ADP DET NOUN", [2, 2, 2, 2, 5, 3], "amod amod ROOT prep det pobj"),
    ("left of the tree", "ADV ADP DET NOUN", [0, 0, 3, 1], "ROOT prep det pobj"),
    ("he sits there", "PRON VERB ADV", [1, 1, 1], "nsubj ROOT advmod"),
]


@pytest.fixture
def head_nouns():
    """What the cell of notebook 04 defines, with the parser that is here."""

    def run():
        notebook = json.loads((ROOT / "notebooks/04_ris.ipynb").read_text("utf-8"))
        (cell,) = [source for cell in notebook["cells"] if "def head_noun" in (source := "".join(cell["source"]))]
        names = {"english_parser": global_local.english_parser, "HEAD_NOUN_WEIGHT": 0.5}
        exec(cell, names)
        return names

    return run


def test_head_noun_phrases_are_those_of_the_root(english_model, head_nouns):
    english_model(PARSED)
    cell = head_nouns()
    assert cell["parser_name"] == "spaCy en_core_web_md 0.1.0"
    phrases = [cell["head_noun"](parsed) for parsed in cell["parser"].pipe([words for words, *_ in PARSED])]
    assert phrases == ["the man", "big red dog", "left of the tree", "he"]


class Parsed(list):
    """As much of spaCy's Doc as a head noun is found by; `chunks`: first and last token of each noun chunk."""

    def __init__(self, words, heads, chunks):
        super().__init__(SimpleNamespace(i=i, text=word) for i, word in enumerate(words.split()))
        self.text = words
        for token, head in zip(self, heads, strict=True):
            token.head, token.children = self[head], [one for one in self if heads[one.i] == token.i != one.i]
        self.noun_chunks = [Chunk(self[first : last + 1]) for first, last in chunks]


class Chunk(list):
    text = property(lambda self: " ".join(token.text for token in self))


def test_the_head_noun_is_of_the_root_or_its_first_child_or_everything(head_nouns):
    chunks = [[(0, 1), (4, 5)], [(0, 2), (4, 5)], [(2, 3)], [(0, 0)]]
    parsed = [Parsed(words, heads, found) for (words, _, heads, _), found in zip(PARSED, chunks, strict=True)]
    phrases = [head_nouns()["head_noun"](one) for one in parsed]
    assert phrases == ["the man", "big red dog", "left of the tree", "he"]


def test_without_a_parser_it_is_said(monkeypatch, head_nouns):
    monkeypatch.setitem(sys.modules, "spacy", None)
    cell = head_nouns()
    assert (cell["parser"], cell["parser_name"]) == (None, "none: spaCy is not installed, or no English model for it")
