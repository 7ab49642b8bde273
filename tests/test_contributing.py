"""CONTRIBUTING.md is true: its blocks do what it says, and its commands and files are there."""

import importlib
import re
import shutil
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bsap_utils import (
    ROOT,
    aux_prompts,
    cli,
    evaluation,
    normalization,
    plotting,
    proposals,
    results,
    retrieval,
    scoring,
)

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n# bsap_utils/(\w+)\.py\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def followed():
    """The package with every block executed in the module that it names, and put back afterwards."""
    assert [name for name, _ in BLOCKS] == ["normalization", "plotting", "aux_prompts"] and TEXT.count("```python") == 3
    registries = (
        normalization.METHODS,
        normalization._CORRECTIONS,
        plotting.METHOD_LABELS,
        plotting.METHOD_COLOURS,
        aux_prompts.BANKS,
    )
    patches = [patch.dict(registry) for registry in registries]
    for one in patches:
        one.start()
    for name, code in BLOCKS:
        exec(code, dict(vars(importlib.import_module(f"bsap_utils.{name}"))))
    yield
    for one in patches:
        one.stop()


def test_the_new_method_and_bank_reach_predictions_tables_and_figures(followed, sample, scorer):
    bank = aux_prompts.auxiliary_prompts("materials", sample)
    assert bank == ["wood", "metal", "glass", "cloth", "stone"]
    ds = sample.select(split="val", limit=4)
    regions = proposals.ground_truth(ds)
    logits = scoring.refer_logits([scorer], ds, regions, bank, ("crop",))
    scores = normalization.METHODS["median"](logits.query, logits.aux, logits.group)
    expected = logits.query.numpy() - np.median(logits.aux.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="aux_logits"):
        normalization.METHODS["median"](logits.query, torch.full_like(logits.aux, torch.nan), logits.group)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 9, 4, generator=torch.manual_seed(0)), dim=-1)
    index = retrieval.BalancedIndex.build(images, texts[:5], logit_scale=10.0, method="median")
    scores = normalization.METHODS["median"](
        10 * images @ texts[5:].T, 10 * images @ texts[:5].T, torch.zeros(9, dtype=int)
    )
    assert torch.equal(index.search(texts[5:], 3)[1], scores.T.topk(3).indices), "the index takes it, too"
    predictions = evaluation.rec_predictions(ds, regions, logits, ["clip", "median"])
    setting = dict.fromkeys(("dataset", "split", "proposals", "model", "pretrained", "visual_prompts", "aux_bank"), "x")
    table = evaluation.rec_table(predictions, **setting, resamples=100)
    assert list(table["method"]) == ["clip", "median"]
    assert "| Median |" in results.markdown_table(table[["method", "accuracy"]])
    figure = plotting.accuracy_bars(table, "x")
    assert "Median" in [label.get_text() for label in figure.axes[0].get_yticklabels()]
    plt.close(figure)


def test_a_data_set_in_the_layout_is_checked_and_scored_without_code(sample, tmp_path):
    shutil.copytree(ROOT / "data/refshapes/refshapes", tmp_path / "mine")
    (tmp_path / "images").symlink_to(ROOT / "data/refshapes/images")
    shutil.copy(ROOT / "data/refshapes/refshapes_dets_dict.json", tmp_path / "mine_dets_dict.json")
    result = CliRunner().invoke(cli.app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert re.findall(r"mine +(\w+)", result.output) == ["test", "train", "val"]


def test_its_commands_and_files_exist():
    for name in re.findall(r"\]\(([\w/.]+)\)|`((?:tests|bsap_utils)/[\w/.]+)`", TEXT):
        assert (ROOT / "".join(name)).is_file(), name
    goals = re.findall(r"^    make (\w+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert goals and all(re.search(rf"^{goal}:", makefile, re.MULTILINE) for goal in goals)
    for name, parameters in re.findall(r"bsap run (\w+)((?: -p \w+ \S+)+)", TEXT):
        declared = cli.declared(ROOT / f"notebooks/{name}.ipynb")
        for parameter in re.findall(r"-p (\w+)", parameters):
            assert parameter in declared
    oracle = (ROOT / "tests/test_normalization.py").read_text()
    assert "def oracle(" in oracle and "\nNAMES = " in oracle
    download = importlib.import_module("bsap_utils.download")
    assert hasattr(download, "ADDRESSES") and hasattr(download, "SPLITS")
