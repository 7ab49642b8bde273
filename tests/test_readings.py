"""The sentences that open the notebooks: their wording follows the signs of the numbers."""

import pandas as pd
import pytest

from bsap_utils import readings
from bsap_utils.evaluation import ORACLE

BETTER, WORSE, UNCLEAR = (2.0, 0.5, 3.5), (-2.0, -3.5, -0.5), (0.1, -1.0, 1.2)  # difference to CLIP, and its interval
outcomes = pytest.mark.parametrize(
    ("outcome", "said"), [(BETTER, "better than"), (WORSE, "worse than"), (UNCLEAR, "not told from")]
)


def against_clip(outcome, **more):
    return dict(zip(("delta_vs_clip", "delta_ci_low", "delta_ci_high"), outcome, strict=True)) | more


@outcomes
def test_rec_leads_with_the_verdict_and_uses_the_last_split(outcome, said):
    same = {"dataset": "refcoco", "n": 1000, "aux_bank": "coco80"}
    rows = [against_clip((0, 0, 0), split=split, method="clip", accuracy=60.0, **same) for split in ("val", "testA")]
    rows.insert(1, against_clip(WORSE, split="val", method="bsap", accuracy=1.0, **same))
    rows.append(against_clip(outcome, split="testA", method="bsap", accuracy=60 + outcome[0], **same))
    answer = readings.rec_answer(pd.DataFrame(rows), temperature=5)
    assert answer.startswith(
        f"On refcoco testA BSAP (T = 5, bank “coco80”) is **{said} CLIP**: right for {60 + outcome[0]:.1f} %"
    )
    assert "of 1,000 expressions, CLIP for 60.0 %" in answer and f"{outcome[0]:+.1f} points" in answer
    assert f"of all 2 methods {'CLIP' if outcome[0] < 0 else 'BSAP'} comes out highest" in answer.replace("Of", "of")


@outcomes
def test_ranges_say_whether_the_level_does_harm(outcome, said):
    share = {"region": 0.2, "region_ci_low": 0.1, "region_ci_high": 0.3}
    shares = pd.DataFrame([share], index=["CLIP, in an image"])
    changes = pd.DataFrame([against_clip(outcome)] * 2, index=["CLIP less each region's mean", "BSAP"])
    answer = readings.range_answer(shares, changes, pd.DataFrame({"spearman": [0.4]}), ("refshapes", "val"), "x")
    harm = {"better than": "and does harm", "worse than": "and helps", "not told from": "and is not shown to do harm"}[
        said
    ]
    assert (
        "the bundled sample (refshapes val) 20 %" in answer and harm in answer and f"BSAP is **{said} CLIP**" in answer
    )
    assert "ρ = 0.40" in answer


@outcomes
def test_ris_has_a_verdict_of_each_measure(outcome, said):
    rows = pd.DataFrame({"method": ["clip", "bsap", ORACLE], "miou": [50.0, 48.0, 75.0], "oiou": [40.0, 41.0, 70.0]})
    for measure, values in (("miou", outcome), ("oiou", WORSE)):
        for column, value in zip(("vs_clip", "low", "high"), values, strict=True):
            rows[f"delta_{measure}_{column}"] = value
    answer = readings.ris_answer(rows.assign(dataset="refcoco", split="val"))
    assert (
        f"by mean IoU **{said} CLIP** (48.0 % against 50.0 %" in answer
        and "by overall IoU **worse than CLIP**" in answer
    )
    assert "27.0 points are lost by choosing, 25.0 by the segmenter" in answer


@outcomes
def test_the_family_and_the_choice_report_what_became_of_what_was_chosen(outcome, said):
    rows = [against_clip(WORSE, level="bsap", accuracy=58.0), against_clip(outcome, level="chosen", accuracy=61.0)]
    table = pd.DataFrame(rows).assign(clip_accuracy=60.0, temperature=["1", "inf"], weight=[1.0, 0.45])
    answer = readings.family_answer(table, "refcoco", "val", "testA")
    assert "that point is **worse than CLIP**, 58.0 % against 60.0 %" in answer
    assert f"best on val, T = inf and w = 0.45, is **{said} CLIP** with 61.0 %" in answer

    rows = [against_clip(WORSE, level="default", delta_vs_default=0.0, accuracy=58.0),
            against_clip(BETTER, level="bank: a", delta_vs_default=-7.0, accuracy=51.0),
            against_clip(BETTER, level="template: b", delta_vs_default=1.0, accuracy=59.0),
            against_clip(outcome, level="bank × temperature: a, 5", delta_vs_default=9.0, accuracy=62.0)]  # fmt: skip
    table = pd.DataFrame(rows).assign(clip_accuracy=60.0, default_ci_low=-1.0, default_ci_high=1.0)
    answer = readings.choice_answer(table.assign(headline=table.index == 3), "refcoco", "val", "testA")
    assert (
        "BSAP with its defaults is **worse than CLIP**" in answer
        and "moves it most is *bank: a*: -7.0 points" in answer
    )
    assert f"*bank × temperature: a, 5*, is **{said} CLIP**: 62.0 % against 60.0 %" in answer
    assert "Nothing that was tried" in readings.choice_answer(
        table.assign(headline=table.index == 0), "x", "val", "test"
    )
