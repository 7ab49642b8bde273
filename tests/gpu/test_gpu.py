"""The CUDA path: `pytest -m gpu` on a machine with a GPU; and that the script which proves and times it still runs."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from bsap_utils import ROOT, scoring
from bsap_utils.normalization import METHODS, shift_and_scale_from_features
from bsap_utils.regions import decode_masks, ground_truth, pair_up
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
def test_a_real_out_of_memory_halves_the_batch_and_loses_nothing(few, scorer, on_cpu):
    device = ClipScorer(scorer.model_name, device="cuda", precision="fp32", batch_size=4096, cache=False)
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600e6) / total)
    try:
        found = device.encode_regions(few, ground_truth(few), PROMPTS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (found * on_cpu).sum(-1).mean(1).min() >= 0.9999


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
    pairs, candidate_logits = pair_up(few, ground_truth(few)), scorer.logits(image, aux)
    s = scorer.pair_logits(image, scorer.encode_texts(few.expressions["text"], scoring.TEMPLATE), pairs)
    there = METHODS["bsap"](s.cuda(), candidate_logits.cuda(), on_device(pairs))
    assert torch.allclose(there.cpu(), METHODS["bsap"](s, candidate_logits, pairs), atol=1e-6)
