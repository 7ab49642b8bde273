"""What CLIP is shown of a region, against PIL doing the same thing one region at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage, spatial

from bsap_utils import visual_prompts as vp

BOXES = [(100, 50, 80, 90), (0, 0, 320, 240), (290, 180, 30, 60), (7, 9, 3, 1)]


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


def shown(name, image, boxes, masks=None):
    return vp.VISUAL_PROMPTS[name](to_tensor(image), torch.tensor(boxes).float(), masks)


@pytest.fixture(scope="module")
def scene(sample):
    return sample.load_image(sample.images.index[3])


@pytest.fixture(scope="module")
def blurred(scene):
    return scene.filter(ImageFilter.GaussianBlur(100))


@pytest.fixture(scope="module")
def masks():
    """Blobs with holes, one of a single pixel, an empty one, a full one."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(2, 240, 320)), (0, 12, 12))
    single, empty, full = np.zeros((3, 240, 320), dtype=bool)
    single[100, 200], full[:] = True, True
    return np.stack([*(noise > noise.std()), single, empty, full])


def test_crop_is_pil_crop(scene):
    boxes = [[10.2, 20.7, 50.0, 60.0], [0, 0, 320, 240], [300.0, 200.0, 20.0, 40.0]]
    for (x, y, w, h), view in zip(boxes, shown("crop", scene, boxes), strict=True):
        expected = scene.crop((round(x), round(y), round(x + w), round(y + h)))
        assert (to_array(view) == np.asarray(expected)).all()


@pytest.mark.parametrize("sigma", [1, 3, 20, 100])
def test_gaussian_blur_is_pils(sample, sigma):
    for image_id in sample.images.index[:4]:
        image = sample.load_image(image_id)
        pils = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).astype(int)
        difference = np.abs(to_array(vp.gaussian_blur(to_tensor(image), sigma)) - pils)
        assert difference.max() <= (1 if sigma == 100 else 3)  # PIL rounds six times
        assert difference.mean() < (0.2 if sigma >= 3 else 0.6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.4, 300), st.integers(0, 9))
def test_blurs_of_any_size_stay_in_range_and_near_pils(height, width, sigma, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    ours = to_array(vp.gaussian_blur(to_tensor(image), sigma))
    pils = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).astype(int)
    assert np.abs(ours - pils).mean() < (4 if sigma < 3 else 2)  # a narrow blur keeps detail, and is interpolated


@pytest.mark.parametrize(
    ("name", "shape"), [("blur", "rectangle"), ("circle_gray", "ellipse"), ("circle_blur", "ellipse")]
)
def test_outside_the_box_or_its_ellipse_is_grey_or_blurred(scene, blurred, name, shape):
    outside = scene.convert("L").convert("RGB") if name == "circle_gray" else blurred
    for box, view in zip(BOXES, shown(name, scene, BOXES), strict=True):
        mask = drawn(shape, box, scene.size)
        expected = np.asarray(Image.composite(scene, outside, mask)).astype(int)
        edge = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask)  # where PIL rounds otherwise
        clear = ~edge if shape == "ellipse" else np.ones_like(edge)
        difference = np.abs(to_array(view) - expected)[clear]
        inside = np.asarray(mask)[clear] > 0
        assert (difference[inside] == 0).all()
        assert difference[~inside].max(initial=0) <= 1


@pytest.mark.parametrize("name", ["mask_gray", "mask_blur"])
def test_outside_the_mask_is_grey_or_blurred(scene, blurred, masks, name):
    outside = np.asarray(scene.convert("L").convert("RGB") if name == "mask_gray" else blurred).astype(int)
    for mask, view in zip(masks, shown(name, scene, np.zeros((len(masks), 4)), torch.from_numpy(masks)), strict=True):
        assert (to_array(view)[mask] == np.asarray(scene)[mask]).all()
        assert np.abs(to_array(view) - outside)[~mask].max(initial=0) <= 1


def test_shade_is_pils_alpha_composite(scene):
    for box, view in zip(BOXES, shown("shade", scene, BOXES), strict=True):
        overlay = Image.new("RGBA", scene.size, (240, 0, 30, 0))
        overlay.paste((240, 0, 30, 127), mask=drawn("rectangle", box, scene.size))
        expected = np.asarray(Image.alpha_composite(scene.convert("RGBA"), overlay).convert("RGB")).astype(int)
        assert np.abs(to_array(view) - expected).max() <= 1


def test_the_circle_is_a_line_along_the_ellipse_and_touches_nothing_else(scene):
    lines = vp.ellipse_line(to_tensor(scene), torch.tensor(BOXES[:3]).float(), thickness=8 / 240)
    pixels = np.stack(np.mgrid[:240, :320], -1).reshape(-1, 2) + 0.5
    angle = np.linspace(0, 2 * np.pi, 4000)
    for (x, y, w, h), line in zip(BOXES[:3], lines.numpy(), strict=True):
        outline = np.stack([y + h / 2 * (1 + np.sin(angle)), x + w / 2 * (1 + np.cos(angle))], -1)
        distance = spatial.cKDTree(outline).query(pixels)[0].reshape(240, 320)
        assert line[distance < 3.2].all() and not line[distance > 4.1].any()
    thin = vp.ellipse_line(to_tensor(scene), torch.tensor([[50.0, 50, 100, 100]]), thickness=0.001)
    assert int(thin.sum()) == pytest.approx(100 * np.pi, rel=0.1)  # one pixel


@pytest.mark.parametrize("box", [(100, 50, 80, 90), (20, 30, 200, 40), (60, 60, 9, 11)])
def test_the_circle_is_red_and_closed(scene, box):
    (view,) = shown("circle", scene, [box])
    red = (to_array(view) == (255, 0, 0)).all(-1)
    assert (to_array(view)[~red] == np.asarray(scene)[~red]).all()
    assert ndimage.label(~red)[1] == 2  # the inside does not leak out


def test_mask_contour_is_what_dilation_adds_and_erosion_takes(scene, masks):
    views = shown("mask_contour", scene, np.zeros((len(masks), 4)), torch.from_numpy(masks))
    lines = vp.mask_line(to_tensor(scene), None, torch.from_numpy(masks), thickness=6 / 240)
    for mask, view, thick in zip(masks, views, lines.numpy(), strict=True):
        for size, line in ((3, (to_array(view) == (255, 0, 0)).all(-1)), (7, thick)):
            square = np.ones((size, size))
            assert (line == (ndimage.binary_dilation(mask, square) & ~ndimage.binary_erosion(mask, square))).all()


def test_mask_crop_is_pils_composite_cut_out(scene, masks):
    boxes = [*BOXES, (0, 0, 320, 240)]
    mean = Image.new("RGB", scene.size, tuple(round(255 * m) for m in (0.48145466, 0.4578275, 0.40821073)))
    for (x, y, w, h), mask, view in zip(
        boxes, masks, shown("mask_crop", scene, boxes, torch.from_numpy(masks)), strict=True
    ):
        expected = Image.composite(scene, mean, Image.fromarray(mask)).crop((x, y, x + w, y + h))
        assert (to_array(view) == np.asarray(expected)).all()


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_squash_is_pils_resize(scene, kind):
    expected = np.asarray(scene.resize((48, 64), Image.Resampling[kind.upper()])).astype(int)
    assert np.abs(to_array(vp.squash(to_tensor(scene), (64, 48), kind)) - expected).max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4),
    st.integers(1, 48),
    st.integers(0, 9),
    st.sampled_from(["bicubic", "bilinear"]),
)
def test_all_views_together_are_squashed_as_each_alone(shapes, size, seed, kind):
    """What a GPU does against what a CPU does: neither black nor white, where the order of passes would matter."""
    generator = np.random.default_rng(seed)
    views = [to_tensor(generator.integers(80, 176, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    together = vp.squash_together(views, (size, 2 * size), kind).int()
    each = torch.stack([vp.squash(view, (size, 2 * size), kind) for view in views]).int()
    assert (together - each).abs().max() <= 2
    alike = torch.stack([views[0], views[0].flip(2)])
    each = vp.squash_together(list(alike), (size, size), kind)
    assert (vp.squash_together(alike, (size, size), kind) == each).all()


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(-1e6, 1e6, allow_nan=False, width=32)] * 4), st.integers(1, 40), st.integers(1, 40))
def test_any_box_shows_at_least_one_pixel(box, height, width):
    left, top, right, bottom = vp.pixel_edges(torch.tensor([box]), height, width)[0].tolist()
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_every_prompt_shows_every_region_in_order_and_changes_no_input(scene, masks, monkeypatch):
    image, boxes, masks = to_tensor(scene), torch.tensor([*BOXES, (5, 5, 50, 50)]).float(), torch.from_numpy(masks)

    def every(boxes, masks):
        return torch.stack([vp.show_regions(image, boxes, name, (48, 48), masks) for name in vp.VISUAL_PROMPTS])

    views = every(boxes, masks)
    assert views.shape == (len(vp.VISUAL_PROMPTS), 5, 3, 48, 48) and views.dtype == torch.uint8
    assert (image == to_tensor(scene)).all()
    assert len({view.numpy().tobytes() for view in views[:-1, 0]}) == len(views) - 1, "two prompts look alike"
    assert (every(boxes.flip(0), masks.flip(0)).flip(1) == views).all()
    monkeypatch.setattr(vp, "AT_ONCE", 2 * image.numel())  # a large picture with many regions: two at a time
    assert (every(boxes, masks) == views).all()


def test_masks_are_shown_by_the_prompts_that_need_them_alone(scene, masks):
    image, boxes, masks = to_tensor(scene), torch.tensor(BOXES).float(), torch.from_numpy(masks[:4])
    with pytest.raises(KeyError, match="halo"):
        vp.show_regions(image, boxes, "halo", (8, 8))
    for name in vp.VISUAL_PROMPTS.keys() - vp.MASK_PROMPTS:
        without = vp.show_regions(image, boxes, name, (8, 8))
        assert (vp.show_regions(image, boxes, name, (8, 8), masks) == without).all()


def test_patches_of_a_mask_are_those_covered_half_as_much_as_the_best(masks):
    keep = vp.patch_masks(torch.from_numpy(masks), (8, 8)).numpy()
    coverage = masks.reshape(-1, 8, 30, 8, 40).mean((2, 4)).reshape(-1, 64)
    assert (keep[:2] == (coverage[:2] >= coverage[:2].max(1, keepdims=True) / 2)).all() and 0 < keep[:2].mean() < 1
    assert keep[2].sum() == 1 and keep[2].argmax() == 100 // 30 * 8 + 200 // 40  # smaller than a patch: that patch
    assert keep[3].all() and keep[4].all()
