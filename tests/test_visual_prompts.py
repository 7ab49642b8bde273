"""What CLIP is shown of a region, against PIL doing the same thing one region at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage, spatial

from bsap_utils import visual_prompts as vp


def to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def to_array(view):
    return view.permute(1, 2, 0).numpy().astype(int)


def drawn(shape, box, size):
    """A PIL mask of the pixels that `shape` ("rectangle", "ellipse") covers; `box` in whole pixels, xywh."""
    x, y, w, h = box
    mask = Image.new("L", size)
    getattr(ImageDraw.Draw(mask), shape)([x, y, x + w - 1, y + h - 1], fill=255)
    return mask


BOXES = [(100, 50, 80, 90), (0, 0, 320, 240), (290, 180, 30, 60), (7, 9, 3, 1)]


@pytest.fixture(scope="module")
def scene(sample):
    return sample.load_image(sample.images.index[3])


@pytest.fixture(scope="module")
def blurred(scene):
    return scene.filter(ImageFilter.GaussianBlur(100))


@pytest.fixture(scope="module")
def masks():
    """Blobs with holes, one that touches the image's border, one of a single pixel, an empty one, a full one."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(2, 240, 320)), (0, 12, 12))
    single, empty, full = np.zeros((3, 240, 320), dtype=bool)
    single[100, 200], full[:] = True, True
    return np.stack([*(noise > noise.std()), single, empty, full])


def test_crop_is_pil_crop(scene):
    boxes = torch.tensor([[10.2, 20.7, 50.0, 60.0], [0, 0, 320, 240], [300.0, 200.0, 20.0, 40.0]])
    for (x, y, w, h), view in zip(boxes.tolist(), vp.crop(to_tensor(scene), boxes), strict=True):
        expected = scene.crop((round(x), round(y), round(x + w), round(y + h)))
        assert (view.permute(1, 2, 0).numpy() == np.asarray(expected)).all()


def test_blur_is_sharp_inside_and_as_pil_outside(scene):
    x, y, w, h = 100, 50, 80, 90
    view = vp.blur(to_tensor(scene), torch.tensor([[x, y, w, h]]).float())[0].permute(1, 2, 0).numpy().astype(int)
    mask = Image.new("L", scene.size)
    ImageDraw.Draw(mask).rectangle([x, y, x + w - 1, y + h - 1], fill=255)
    expected = np.asarray(Image.composite(scene, scene.filter(ImageFilter.GaussianBlur(100)), mask)).astype(int)
    assert (view[y : y + h, x : x + w] == expected[y : y + h, x : x + w]).all()
    assert np.abs(view - expected).mean() < 3.5


@pytest.mark.parametrize("sigma", [1, 3, 20, 100])
def test_gaussian_blur_is_pils(sample, sigma):
    for image_id in sample.images.index[:6]:
        image = sample.load_image(image_id)
        pils = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).astype(int)
        difference = np.abs(to_array(vp.gaussian_blur(to_tensor(image), sigma)) - pils)
        assert difference.max() <= 3 and difference.mean() < (0.2 if sigma >= 3 else 0.6)  # PIL rounds six times
        if sigma == 100:
            assert difference.max() <= 1
            exact = ndimage.gaussian_filter(np.asarray(image, float), (sigma, sigma, 0), mode="nearest", truncate=6)
            assert np.abs(pils - exact).mean() > 10 * difference.mean(), "that is how far PIL is from a Gaussian"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.5, 300), st.integers(0, 255))
def test_a_blur_of_any_size_keeps_what_is_even_and_invents_nothing(height, width, sigma, grey):
    even = torch.full((3, height, width), grey, dtype=torch.uint8)
    assert (vp.gaussian_blur(even, sigma) == even).all()
    noise = torch.from_numpy(np.random.default_rng(grey).integers(0, 256, (3, height, width), dtype=np.uint8))
    blurred = vp.gaussian_blur(noise, sigma)
    assert blurred.shape == noise.shape and noise.min() <= blurred.min() and blurred.max() <= noise.max()


def test_squash_is_pils_antialiased_bicubic(scene):
    expected = np.asarray(scene.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    ours = vp.squash(to_tensor(scene), 64).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - expected).max() <= 1


VIEWS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(VIEWS, st.integers(1, 48), st.integers(0, 9))
def test_all_views_together_are_squashed_as_pil_squashes_each(shapes, size, seed):
    generator = np.random.default_rng(
        seed
    )  # neither black nor white: where a pass must clip, PIL's order of passes matters
    views = [to_tensor(generator.integers(80, 176, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    together = vp.squash_together(views, (size, 2 * size)).int()
    each = torch.stack([vp.squash(view, (size, 2 * size), exact=True) for view in views]).int()
    assert (together - each).abs().max() <= 2
    alike = torch.stack([views[0], views[0].flip(2)])
    assert (vp.squash_together(alike, size) == vp.squash_together(list(alike), size)).all()


def test_on_a_photograph_both_ways_to_squash_differ_by_rounding(scene):
    views = vp.crop(to_tensor(scene), torch.tensor(BOXES).float())
    together, each = vp.squash_together(views, 64).int(), torch.stack([vp.squash(view, 64) for view in views]).int()
    assert (together - each).abs().max() <= 1 and (together - each).float().abs().mean() < 0.01


def test_as_many_regions_as_one_likes(scene, monkeypatch):
    boxes = torch.tensor(BOXES).float()
    masks = vp.box_masks(boxes, to_tensor(scene))
    whole = vp.show_regions(to_tensor(scene), boxes, ("crop", "mask_blur"), 32, masks)
    monkeypatch.setattr(vp, "AT_ONCE", 3 * 240 * 320 * 2)
    assert (vp.show_regions(to_tensor(scene), boxes, ("crop", "mask_blur"), 32, masks) == whole).all()


def test_exact_views_are_pils(scene):
    x, y, w, h = BOXES[0]
    shown = vp.show_regions(to_tensor(scene), torch.tensor(BOXES[:1]).float(), ("crop", "blur"), 48, exact=True)[:, 0]
    mask = drawn("rectangle", BOXES[0], scene.size)
    by_pil = scene.crop((x, y, x + w, y + h)), Image.composite(scene, scene.filter(ImageFilter.GaussianBlur(100)), mask)
    for view, picture in zip(shown, by_pil, strict=True):
        assert (to_array(view) == np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC))).all()


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(-1e6, 1e6, allow_nan=False, width=32)] * 4), st.integers(1, 40), st.integers(1, 40))
def test_any_box_shows_at_least_one_pixel(box, height, width):
    left, top, right, bottom = vp.pixel_edges(torch.tensor([box]), height, width)[0].tolist()
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_show_regions_keeps_the_order_of_prompts_and_boxes(scene):
    boxes = torch.tensor([[10.0, 20.0, 50.0, 60.0], [200.0, 100.0, 30.0, 90.0]])
    views = vp.show_regions(to_tensor(scene), boxes, ("blur", "crop"), 48)
    assert views.shape == (2, 2, 3, 48, 48) and views.dtype == torch.uint8
    swapped = vp.show_regions(to_tensor(scene), boxes.flip(0), ("crop", "blur"), 48)
    assert (views == swapped.flip(0, 1)).all()


def test_unknown_prompts_are_named():
    with pytest.raises(ValueError, match=r"'halo'.*crop, .*global_local"):
        vp.show_regions(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([[0.0, 0, 4, 4]]), ("crop", "halo"), 8)


# Each prompt against PIL or NumPy, one region at a time


def test_shade_is_pils_alpha_composite(scene):
    views = vp.shade(to_tensor(scene), torch.tensor(BOXES).float())
    for box, view in zip(BOXES, views, strict=True):
        overlay = Image.new("RGBA", scene.size, (240, 0, 30, 0))
        overlay.paste((240, 0, 30, 127), mask=drawn("rectangle", box, scene.size))
        expected = np.asarray(Image.alpha_composite(scene.convert("RGBA"), overlay).convert("RGB")).astype(int)
        assert np.abs(to_array(view) - expected).max() <= 1


def test_circle_is_a_line_along_the_ellipse_and_touches_nothing_else(scene):
    thickness = 8 / 240
    views = vp.circle(to_tensor(scene), torch.tensor(BOXES[:3]).float(), thickness=thickness)
    pixels = np.stack(np.mgrid[:240, :320], -1).reshape(-1, 2) + 0.5
    angle = np.linspace(0, 2 * np.pi, 4000)
    for (x, y, w, h), view in zip(BOXES[:3], views, strict=True):
        outline = np.stack([y + h / 2 * (1 + np.sin(angle)), x + w / 2 * (1 + np.cos(angle))], -1)
        distance = spatial.cKDTree(outline).query(pixels)[0].reshape(240, 320)
        red = (to_array(view) == vp.RED).all(-1)
        assert red[distance < 3.2].all() and not red[distance > 4.1].any()
        assert (to_array(view)[~red] == np.asarray(scene)[~red]).all()


@pytest.mark.parametrize("box", [(100, 50, 80, 90), (20, 30, 200, 40), (60, 60, 9, 11)])
def test_the_circles_line_is_closed_at_its_default_thickness(scene, box):
    view = vp.circle(torch.zeros(3, 240, 320, dtype=torch.uint8), torch.tensor([box]).float())[0]
    assert ndimage.label(to_array(view)[..., 0] == 0)[1] == 2  # the inside does not leak out


@pytest.mark.parametrize("name", ["circle_gray", "circle_blur"])
def test_outside_the_ellipse_is_grey_or_blurred(scene, blurred, name):
    views = vp.VISUAL_PROMPTS[name](to_tensor(scene), torch.tensor(BOXES).float(), None)
    outside = scene.convert("L").convert("RGB") if name == "circle_gray" else blurred
    for box, view in zip(BOXES, views, strict=True):
        mask = drawn("ellipse", box, scene.size)
        expected = np.asarray(Image.composite(scene, outside, mask)).astype(int)
        edge = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask)  # where PIL rounds otherwise
        difference = np.abs(to_array(view) - expected)[~edge]
        inside = np.asarray(mask)[~edge] > 0
        assert (difference[inside] == 0).all()
        far = difference[~inside]
        assert far.sum() <= 3.5 * far.size if name == "circle_blur" else far.max(initial=0) <= 1


@pytest.mark.parametrize("name", ["mask_gray", "mask_blur"])
def test_outside_the_mask_is_grey_or_blurred(scene, blurred, masks, name):
    views = vp.VISUAL_PROMPTS[name](to_tensor(scene), torch.zeros(len(masks), 4), torch.from_numpy(masks))
    outside = np.asarray(scene.convert("L").convert("RGB") if name == "mask_gray" else blurred).astype(int)
    for mask, view in zip(masks, views, strict=True):
        assert (to_array(view)[mask] == np.asarray(scene)[mask]).all()
        difference = np.abs(to_array(view) - outside)[~mask]
        assert difference.sum() <= 3.5 * difference.size if name == "mask_blur" else difference.max(initial=0) <= 1


def test_mask_crop_is_pils_composite_cut_out(scene, masks):
    boxes = [*BOXES, (0, 0, 320, 240)]
    views = vp.mask_crop(to_tensor(scene), torch.tensor(boxes).float(), torch.from_numpy(masks))
    mean = Image.new("RGB", scene.size, tuple(round(255 * m) for m in (0.48145466, 0.4578275, 0.40821073)))
    for (x, y, w, h), mask, view in zip(boxes, masks, views, strict=True):
        expected = Image.composite(scene, mean, Image.fromarray(mask)).crop((x, y, x + w, y + h))
        assert (to_array(view) == np.asarray(expected)).all()


def test_mask_contour_is_what_dilation_adds_and_erosion_takes(scene, masks):
    views = vp.mask_contour(to_tensor(scene), torch.zeros(len(masks), 4), torch.from_numpy(masks), thickness=6 / 240)
    for mask, view in zip(masks, views, strict=True):
        square = np.ones((7, 7))
        line = ndimage.binary_dilation(mask, square) & ~ndimage.binary_erosion(mask, square)
        assert (to_array(view) == np.where(line[..., None], vp.RED, np.asarray(scene))).all()


@pytest.mark.parametrize("name", ["blur", "circle_blur", "mask_blur"])
def test_an_image_is_blurred_once_for_all_its_regions(scene, masks, name, monkeypatch):
    calls, once = [], vp.gaussian_blur
    monkeypatch.setattr(vp, "gaussian_blur", lambda *arguments: calls.append(1) or once(*arguments))
    vp.show_regions(to_tensor(scene), torch.tensor([BOXES[0]] * 5).float(), (name,), 32, torch.from_numpy(masks))
    assert calls == [1]


@pytest.mark.parametrize("name", sorted(vp.MASK_PROMPTS))
def test_prompts_that_show_masks_say_so_when_there_are_none(scene, masks, name):
    with pytest.raises(ValueError, match="needs masks: pass masks, .*crop, shade, blur"):
        vp.show_regions(to_tensor(scene), torch.tensor(BOXES).float(), (name,), 32)
    with pytest.raises(ValueError, match=r"needs masks \[N, 240, 320\]"):
        vp.show_regions(to_tensor(scene), torch.tensor(BOXES).float(), (name,), 32, torch.from_numpy(masks[:4, 1:]))
    with pytest.raises(ValueError, match=r"torch.float32"):
        vp.show_regions(to_tensor(scene), torch.tensor(BOXES).float(), (name,), 32, torch.from_numpy(masks[:4]).float())


def test_every_prompt_shows_every_region_and_changes_no_input(scene, masks):
    image, boxes = to_tensor(scene), torch.tensor([*BOXES, (5, 5, 50, 50)]).float()
    views = vp.show_regions(image, boxes, tuple(vp.VISUAL_PROMPTS), 48, torch.from_numpy(masks))
    assert views.shape == (len(vp.VISUAL_PROMPTS), 5, 3, 48, 48) and views.dtype == torch.uint8
    assert (image == to_tensor(scene)).all()
    one = vp.show_regions(image, boxes[2:3], tuple(vp.VISUAL_PROMPTS), 48, torch.from_numpy(masks[2:3]))
    assert (one[:, 0] == views[:, 2]).all()


def test_patches_of_a_mask_are_those_covered_half_as_much_as_the_best(masks):
    keep = vp.patch_masks(torch.from_numpy(masks), (8, 8)).numpy()
    coverage = masks.reshape(-1, 8, 30, 8, 40).mean((2, 4)).reshape(-1, 64)
    assert (keep[:2] == (coverage[:2] >= coverage[:2].max(1, keepdims=True) / 2)).all() and 0 < keep[:2].mean() < 1
    assert keep[2].sum() == 1 and keep[2].argmax() == 100 // 30 * 8 + 200 // 40  # smaller than a patch: that patch
    assert keep[3].all() and keep[4].all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.floats(0, 1))
def test_any_mask_keeps_a_patch(seed, height, width, rows, share):
    mask = torch.from_numpy(np.random.default_rng(seed).random((1, height, width)) < share)
    assert vp.patch_masks(mask, (rows, 7)).any()
