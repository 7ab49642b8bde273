"""Banks of auxiliary prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsap_utils.aux_prompts import BANKS, auxiliary_prompts, unlabelled_texts
from bsap_utils.datasets import DatasetError


@pytest.mark.parametrize(
    ("bank", "size"), [("categories", 20), ("coco80", 80), ("attributes", 220), ("generic", 16), ("expressions", 256)]
)
def test_each_bank_on_the_sample(sample, bank, size):
    prompts = auxiliary_prompts(bank, sample)
    assert len(prompts) == len(set(prompts)) == size
    assert all(text == text.strip() and text for text in prompts)


def test_the_expression_bank_never_touches_an_evaluated_split(sample):
    evaluated = sample.expressions.loc[sample.expressions["split"] != "train", "text"].str.lower()
    train = set(sample.expressions.loc[sample.expressions["split"] == "train", "text"].str.lower())
    prompts = auxiliary_prompts("expressions", sample, size=400)
    assert set(prompts) <= train and prompts == sorted(prompts)
    changed = sample.expressions.copy()
    changed.loc[evaluated.index, "text"] = "something else"
    other = type(sample)(**{**vars(sample), "expressions": changed})
    assert auxiliary_prompts("expressions", other, size=400) == prompts
    with pytest.raises(DatasetError, match="before select"):
        auxiliary_prompts("expressions", sample.select(split="val"))


@given(st.integers(1, 80), st.integers(0, 10))
def test_a_drawn_bank_is_a_part_of_the_whole_in_its_order(size, seed):
    whole, part = auxiliary_prompts("coco80"), auxiliary_prompts("coco80", size=size, seed=seed)
    assert part == [text for text in whole if text in set(part)] and len(part) == size


def test_seeds_differ(sample):
    assert auxiliary_prompts("expressions", sample, seed=0) != auxiliary_prompts("expressions", sample, seed=1)


def test_a_file_of_ones_own(tmp_path):
    bank = tmp_path / "mine.txt"
    bank.write_text("\ufeffa dog \n\na cat\na dog\n", encoding="utf-8")
    assert auxiliary_prompts(str(bank)) == ["a dog", "a cat"]
    bank.write_text("\n".join(map(str, range(300))))
    assert auxiliary_prompts(str(bank)) == [*map(str, range(300))]  # all: 256 are drawn of `expressions` alone
    bank.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="utf-8"):
        auxiliary_prompts(str(bank))
    bank.write_text("\n \n")
    with pytest.raises(ValueError, match="has 0 prompts"):
        auxiliary_prompts(str(bank))


def test_errors_say_what_there_is(sample):
    with pytest.raises(ValueError, match="categories, coco80, attributes, generic, expressions"):
        auxiliary_prompts("coco81")
    with pytest.raises(ValueError, match="has 16 prompts"):
        auxiliary_prompts("generic", size=17)
    for bank in ("categories", "attributes", "expressions"):
        assert bank in BANKS
        with pytest.raises(ValueError, match="pass ds="):
            auxiliary_prompts(bank)


def test_unlabelled_texts_are_of_the_train_split_and_not_in_the_bank(sample):
    bank = auxiliary_prompts("expressions", sample)
    train = set(sample.expressions.loc[sample.expressions["split"] == "train", "text"].str.lower())
    texts = unlabelled_texts(sample, map(str.upper, bank))
    assert len(texts) == len(set(texts)) == 256 and set(texts) <= train - set(bank)
    assert unlabelled_texts(sample, bank, 40) == texts[:40] and unlabelled_texts(sample, bank, seed=1) != texts
    assert set(unlabelled_texts(sample, train, 10_000)) == train  # nothing else is there
    own = sample.select(split="test")  # without a train split
    assert set(unlabelled_texts(own, ["Blue Fish"], 10_000)) == set(own.expressions["text"].str.lower()) - {"blue fish"}
