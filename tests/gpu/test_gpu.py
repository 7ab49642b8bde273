"""The CUDA path: `pytest -m gpu` on a machine with a GPU. Without one, a pretended device shows what would mix or wait.

And the script which proves and times the path still runs.
"""

import dataclasses
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bsap_utils import ROOT, scoring
from bsap_utils.normalization import METHODS, qb_norm_dynamic, shift_and_scale_from_features
from bsap_utils.regions import Pairs, decode_masks, ground_truth, pair_up
from bsap_utils.retrieval import BalancedIndex
from bsap_utils.scoring import ClipScorer
from bsap_utils.visual_prompts import VISUAL_PROMPTS, show_regions

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = tuple(VISUAL_PROMPTS)


def test_the_script_runs_on_a_cpu():
    command = [sys.executable, "tests/benchmarks/gpu.py", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and '"end_to_end_share_of_bare"' in done.stdout, done.stderr
    assert '"ratio"' in done.stdout and '"operation"' in done.stdout


class Pretended(TorchDispatchMode):
    """Tensors on "cuda" have a device and a shape, no values: what mixes devices, or waits to read one, is an error."""

    answers: dict = {}  # what reading tells, where it is allowed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = dict(kwargs or {})
        to = torch.device(given["device"]).type if given.get("device") is not None else ""
        if to != "cuda" and not any(isinstance(one, FakeTensor) for one in tree_leaves((args, given))):
            with _disable_current_modes():
                return func(*args, **given)
        if func in self.answers:
            return self.answers[func]()
        if func is torch.ops.aten._to_copy.default and to not in ("", args[0].device.type):
            assert given.get("non_blocking"), f"a copy of {list(args[0].shape)} to {to} waits"
        return func(*args, **given)


@pytest.fixture
def pretended():
    with FakeTensorMode(allow_non_fake_inputs=True), Pretended() as mode:
        yield mode


def test_the_pretended_device_refuses_what_mixes_and_what_waits(pretended):
    there = torch.zeros(3, device="cuda")
    assert (there + 1).device.type == "cuda" and torch.ones(3).sum() == 3
    with pytest.raises(Exception, match="(?i)device"):
        there + torch.zeros(3)
    for wait in (torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero, lambda one: one[one > 0]):
        with pytest.raises(Exception, match="waits|scalar|nonzero|tolist"):
            wait(there)


def test_views_are_made_and_encoded_on_the_device_and_nothing_waits(pretended, scorer):
    config = open_clip.get_model_config(scorer.model_name)
    with torch.device("cuda"):
        model = open_clip.CLIP(**config).eval()
    for module in model.modules():
        for name, one in module._parameters.items():
            module._parameters[name] = one if one is None else torch.nn.Parameter(one.detach().bfloat16(), False)
    device = object.__new__(ClipScorer)
    vars(device).update(vars(scorer), model=model, device=torch.device("cuda"), dtype=torch.bfloat16, batch_size=16)
    device._scale, device._shift = torch.zeros(2, 3, 1, 1, device="cuda")
    image, boxes = torch.zeros(3, 480, 640, dtype=torch.uint8, device="cuda"), torch.rand(12, 4) * 200 + 20
    masks = torch.zeros(12, 480, 640, dtype=torch.bool, device="cuda")
    views = [show_regions(image, boxes, name, device.image_size, masks) for name in PROMPTS]
    for features in (device._encode_views(views[:2]), device._whole(image, masks)):
        assert features.device.type == "cuda" and features.dtype == torch.float32 and not len(features) % 12


OPTIONS = {  # of the methods that have no defaults
    "bsap_calibrated": lambda on: {"mean_logit": torch.randn(20, device=on), "image": torch.arange(20, device=on) // 5},
    "db_norm": lambda on: {"image_logits": torch.randn(20, 9, device=on)},
}


@pytest.mark.parametrize("name", METHODS)
def test_no_method_mixes_devices(pretended, name):
    pretended.answers = {
        torch.ops.aten._local_scalar_dense.default: lambda: 3,
        torch.ops.aten.bincount.default: lambda: torch.zeros(20, dtype=torch.long, device="cuda"),
    }
    numbers = torch.arange(60, device="cuda")
    pairs = Pairs(expression=numbers // 3, candidate=numbers % 20, image=numbers // 15, iou=numbers * 0.1)
    s, a, options = torch.zeros(60, device="cuda"), torch.zeros(20, 30, device="cuda"), OPTIONS.get(name, lambda on: {})
    assert METHODS[name](s, a, pairs, **options("cuda")).device.type == "cuda"
    if name not in ("bsap_h", "tas"):
        features = torch.zeros(20, 8, device="cuda"), torch.zeros(30, 8, device="cuda")
        for one in shift_and_scale_from_features(*features, 100.0, name, **options("cuda")):
            assert one.device.type == "cuda"
    assert qb_norm_dynamic(s.view(20, 3), a).device.type == "cuda"


def on_device(pairs):
    return dataclasses.replace(
        pairs, **{name: value.cuda() for name, value in vars(pairs).items() if value is not None}
    )


@pytest.fixture(scope="module")
def few(sample):
    return sample.select(split="val", limit=40)


@pytest.fixture(scope="module")
def on_cpu(few, scorer):
    return scorer.encode_regions(few, ground_truth(few), PROMPTS)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.999)])
def test_features_are_those_of_the_cpu_and_the_same_regions_are_picked(few, scorer, on_cpu, precision, least):
    device = ClipScorer(scorer.model_name, device="cuda", precision=precision, cache=False)
    candidates = ground_truth(few)
    found, pairs = device.encode_regions(few, candidates, PROMPTS), pair_up(few, candidates)
    assert (found * on_cpu).sum(-1).mean(1).min() >= least
    starts = np.flatnonzero(np.diff(pairs.expression.numpy())) + 1
    picks = []
    for one, features in ((scorer, on_cpu), (device, found)):
        scores = one.pair_logits(features[:3], one.encode_texts(few.expressions["text"], scoring.TEMPLATE), pairs)
        picks.append([part.argmax() for part in np.split(scores.numpy(), starts)])
    assert np.mean(np.equal(*picks)) >= 0.99


@pytest.mark.gpu
@needs_gpu
def test_nvjpeg_decodes_what_pil_decodes(few):
    for image_id in few.images.index[:10]:
        difference = scoring.read_image(few, image_id, "cuda").cpu().int() - scoring.read_image(few, image_id).int()
        assert difference.abs().float().mean() < 1.5 and difference.shape[0] == 3


@pytest.mark.gpu
@needs_gpu
def test_nothing_waits_for_the_device_once_an_image_or_region(few, scorer):
    device = ClipScorer(scorer.model_name, device="cuda", precision="bf16", cache=False)
    image_id, candidates = few.images.index[0], ground_truth(few)
    own = candidates[candidates["image_id"] == image_id]
    image = scoring.read_image(few, image_id, "cuda")
    masks = torch.from_numpy(decode_masks(own["segmentation"].tolist(), *image.shape[1:])).cuda()
    boxes = torch.tensor(own[["x", "y", "w", "h"]].to_numpy(np.float32))

    def path():
        device._encode_views([show_regions(image, boxes, name, device.image_size, masks) for name in PROMPTS])
        device._whole(image, masks)

    path()  # the first time, kernels are chosen and the blur's matrices are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        path()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_nvjpeg_never_writes_where_a_waiting_kernel_still_reads(few):
    size = scoring.read_image(few, few.images.index[0], "cuda").shape
    image = torch.full(size, 7, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(10**9)  # about half a second, in which the sum below waits
    total = image.sum()
    del image  # so the next picture of this size may lie there
    pictures = [scoring.read_image(few, image_id, "cuda") for image_id in few.images.index[:5]]
    assert total.item() == 7 * size.numel() and len(pictures) == 5


@pytest.mark.gpu
@needs_gpu
def test_a_real_out_of_memory_halves_the_batch_and_loses_nothing(scorer):
    views = torch.randint(0, 256, (8192, 3, *scorer.image_size), dtype=torch.uint8).cuda()
    found = []
    for batch in (256, 8192):
        device = ClipScorer(scorer.model_name, device="cuda", precision="fp32", batch_size=batch, cache=False)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 700e6) / total)
        try:
            found.append(device._encode_views([views]))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert device.batch_size < 8192 and torch.cosine_similarity(*found).min() >= 0.9999


@pytest.mark.gpu
@needs_gpu
def test_normalization_on_the_device_is_that_of_the_cpu(few, scorer, on_cpu):
    image, aux = on_cpu[0], scorer.encode_texts(few.categories, scoring.TEMPLATE)
    there = shift_and_scale_from_features(image.cuda(), aux.cuda(), scorer.logit_scale, "bsap")
    for ours, theirs in zip(there, shift_and_scale_from_features(image, aux, scorer.logit_scale, "bsap"), strict=True):
        assert torch.allclose(ours.cpu(), theirs, atol=1e-3)
    text = scorer.encode_texts(few.expressions["text"][:20], scoring.TEMPLATE)
    ours = BalancedIndex.build(image, aux, scorer.logit_scale).search(text, 5)
    theirs = BalancedIndex.build(image.cuda(), aux.cuda(), scorer.logit_scale).search(text.cuda(), 5)
    assert torch.allclose(torch.as_tensor(ours[0]), torch.as_tensor(theirs[0]).cpu(), atol=1e-3)
    pairs, a = pair_up(few, ground_truth(few)), scorer.logits(image, aux)
    s = scorer.pair_logits(image, scorer.encode_texts(few.expressions["text"], scoring.TEMPLATE), pairs)
    options = {"bsap_calibrated": {"mean_logit": a[:, :9].mean(1), "image": torch.arange(len(a)) // 9},
               "db_norm": {"image_logits": a[:, :9]}}  # fmt: skip
    for name, method in METHODS.items():
        own = options.get(name, {})
        there = method(s.cuda(), a.cuda(), on_device(pairs), **{key: value.cuda() for key, value in own.items()})
        assert torch.allclose(there.cpu(), method(s, a, pairs, **own), atol=1e-6), name
