"""What prose says of a result, held against the cell of the table that it rests on: sign, size, and every digit shown."""

import re

import nbformat
import pandas as pd
import pytest

from bsap_utils import ROOT

COCO, THINGS = "coco_val2017_vitb16", "things_vith14"


def prose(name):
    """The text of the README, or of a notebook's Markdown cells, on one line."""
    if name == "README.md":
        return " ".join((ROOT / name).read_text(encoding="utf-8").split())
    (path,) = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    return " ".join(" ".join(cells).split())


def rows(table, **where):
    frame = pd.read_csv(ROOT / "figures" / f"{table}.csv")
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


def cell(table, column, **where):
    found = rows(table, **where)[column]
    assert len(found) == 1, f"{table}: {where} are {len(found)} rows"
    return float(found.iloc[0])


def real(column, method, temperature, scores=COCO):
    return cell("real/table_real_scores", column, scores=scores, method=method, temperature=temperature)


def regime(column, **where):
    return rows("sample/table_regimes", **where)[column]


def rec(column, method):
    return cell("sample/table_rec", column, split="test", method=method)


def worst(column, **where):
    return cell("sample/table_weights", column, **where)


# (where it stands, the words as they stand there, whether the table says so)
CLAIMS = [
    ("README.md", "rises by 2.8 points with BSAP as published (T = 1)",
     lambda: round(real("delta", "bsap", 1), 1) == 2.8 and real("ci_low", "bsap", 1) > 0),
    ("README.md", "by 5.3 with a softer pool (T = 3)",
     lambda: round(real("delta", "bsap", 3), 1) == 5.3 and real("ci_low", "bsap", 3) > 0),
    ("README.md", "with a bank in other words than the queries it can cost points",
     lambda: (regime("gain_bsap_ci_high", proposals="gt", bank="generic", template="a photo of {}") < 0).all()),
    ("README.md", "a weight that needs no labels takes that harm away",
     lambda: worst("worst", temperature=1, weight="w*") > -1.5 and worst("worst", temperature=1, weight="w = 1") < -4),
    ("README.md", "On the bundled sample, in the sample CLIP's own domain, it shows no difference",
     lambda: rec("delta_ci_low", "bsap") < 0 < rec("delta_ci_high", "bsap")),
    ("01", "the mean climbs by about a third of what being meant is worth under both real CLIPs",
     lambda: (lambda t: (t["means, 5 to 95 %"] / t["own text above the mean"]).between(0.28, 0.4).all())(
         rows("sample/table_range_summary")[lambda t: t["scores"].isin([COCO, THINGS])])),
    ("01", "hardly any of THINGS", lambda: cell("sample/table_range_summary", "outbid, %", scores=THINGS) < 12),
    ("01", "many of COCO and most of the sample",
     lambda: 30 < cell("sample/table_range_summary", "outbid, %", scores=COCO) < 50
     < cell("sample/table_range_summary", "outbid, %", scores="refshapes val")),
    ("01", "Among photographs of THINGS about two fifths of what decides is the photograph's own level, of COCO's an eighth",
     lambda: abs(cell("sample/table_variance", "region", scores=f"{THINGS}, CLIP") - 0.4) < 0.04
     and abs(cell("sample/table_variance", "region", scores=f"{COCO}, CLIP") - 0.125) < 0.02),
    ("01", "(Subtraction, NNN) lower the share; BSAP at $T = 1$ need not",
     lambda: all(cell("sample/table_variance", "region", scores=f"refshapes, {one}")
                 < cell("sample/table_variance", "region", scores="refshapes, CLIP") - 0.03 for one in ("Subtraction", "NNN"))
     and cell("sample/table_variance", "region", scores="refshapes, BSAP")
     > cell("sample/table_variance", "region", scores="refshapes, CLIP")),
    ("01", "Parts and loose boxes are hubs",
     lambda: (rows("sample/table_kind_hubs")[lambda t: t["kind"].str.startswith("part")]["clip"] > 1.5).all()),
    ("01", "BSAP takes much *less* off it",
     lambda: (rows("sample/table_kind_hubs")[lambda t: t["kind"].str.startswith("bare")]["bsap"] > 2.5).all()),
    ("05", "$w^*$ brings nearly all of these to zero or above",
     lambda: (regime("gain_calibrated") > -1.2).all() and (regime("gain_bsap") < -4).any()),
    ("05", "with $w^*$ the worst regime loses about a point at any $T$ from 1 on, where $w = 1$ loses up to five "
           "(eleven at $T = 0.5$)",
     lambda: all(worst("worst", temperature=t, weight="w*") > -1.3 for t in (1, 2, 5, 10))
     and -5 < worst("worst", temperature=1, weight="w = 1") < -4.5
     and round(worst("worst", temperature=0.5, weight="w = 1")) == -11),
    ("05", "image → text, $w^*$ with the mean as pool loses four",
     lambda: round(cell("real/table_real_control", "delta", scores=COCO, method="bsap_calibrated",
                        temperature=float("inf"))) == -4),
    ("05", "The choice that needs no labels and lost least here is $T$ by hubness together with $w^*$",
     lambda: (lambda t: t.loc[t["worst"].idxmax(), "choice"])(
         rows("sample/table_choices")[lambda t: t["choice"].str.contains("w\\*|hubness|BSAP")]) == "T by hubness, w*"),
    ("05", "the one with labels gains most",
     lambda: (lambda t: t.loc[t["mean"].idxmax(), "choice"])(
         rows("sample/table_choices")[lambda t: ~t["choice"].str.startswith("hindsight")]) == "T and w by labels"),
    ("05", "taking it off changes nothing that can be shown",
     lambda: ((rows("sample/table_control")["delta_ci_low"] <= 0) & (rows("sample/table_control")["delta_ci_high"] >= 0)).all()),
    ("05", "reported BSAP 4 points *below* CLIP",
     lambda: round(regime("gain_bsap", proposals="rpn", bank="categories", template="a photo of {}").iloc[0]) == -4),
    ("05", "Few prompts are worse than none",
     lambda: (rows("sample/table_bank_size", size=2)["gain"] < -3).all()),
    ("07", "the length of their mean is about 0.7",
     lambda: rows("real/table_real_level")[["‖mean image‖", "‖mean text‖"]].stack().between(0.6, 0.8).all()),
    ("07", "BSAP as published ($T = 1$) gains on the captions and shows no difference on THINGS",
     lambda: real("ci_low", "bsap", 1) > 0 > real("ci_low", "bsap", 1, THINGS)),
    ("07", "plain CLIP is already right 94 times in 100",
     lambda: abs(rows("real/table_real_scores", scores=THINGS, method="clip")["recall_1"].iloc[0] - 94) < 0.5),
    ("07", "DB-Norm (last row) does great harm",
     lambda: (rows("real/table_real_scores", method="db_norm")["ci_high"] < -15).all()),
    ("07", "on both sets a soft maximum with $T$ of 3 to 5 does better than BSAP's $T = 1$",
     lambda: all(real("delta", "bsap", t, one) > real("delta", "bsap", 1, one) + 1.5 for t in (3, 5) for one in (COCO, THINGS))),
    ("07", "the mean, which by itself shows no difference there",
     lambda: real("ci_low", "bsap", float("inf")) < 0 < real("ci_high", "bsap", float("inf"))),
    ("07", "$w^*$ makes a small $T$ safe",
     lambda: all(real("ci_low", "bsap_calibrated", t, one) > 0 > real("ci_low", "bsap", 0.5, one)
                 for t in (0.5, 1) for one in (COCO, THINGS))),
    ("07", "costs points on COCO and changes next to nothing on THINGS",
     lambda: cell("real/table_real_control", "ci_high", scores=COCO, method="bsap", temperature=float("inf")) < 0
     and abs(cell("real/table_real_control", "delta", scores=THINGS, method="bsap", temperature=float("inf"))) < 0.5),
    ("07", "BSAP at $T = 1$ needs about 100 texts to reach CLIP, at $T = 3$ about 25",
     lambda: cell("real/table_real_bank_size", "delta", scores=COCO, size=50, temperature=1) < 0
     < cell("real/table_real_bank_size", "delta", scores=COCO, size=100, temperature=1)
     and cell("real/table_real_bank_size", "delta", scores=COCO, size=10, temperature=3) < 0
     < cell("real/table_real_bank_size", "delta", scores=COCO, size=25, temperature=3)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "words", "holds"), CLAIMS, ids=[f"{where}-{words[:40]}" for where, words, _ in CLAIMS]
)
def test_the_table_says_what_the_words_say(where, words, holds):
    assert " ".join(words.lower().split()) in prose(where).lower(), (
        "the claim has gone from the text: take it from here too"
    )
    assert holds()


def signed(value):
    return f"{value:+.1f}".replace("-", "−")


def test_the_readmes_real_scores_are_those_of_the_table():
    methods = {"BSAP, T = 1": ("bsap", 1), "BSAP, T = 3": ("bsap", 3), "mean (T = ∞)": ("bsap", float("inf")),
               "BSAP, T = 1, weight without labels": ("bsap_calibrated", 1)}  # fmt: skip
    text = prose("README.md")
    for name, (method, temperature) in methods.items():
        cells = []
        for scores in (COCO, THINGS):
            delta, low, high = (real(column, method, temperature, scores) for column in ("delta", "ci_low", "ci_high"))
            cells.append(f"{signed(delta)} [{signed(low)}, {signed(high)}]")
        assert f"| {name} | {' | '.join(cells)} |" in text
    levels = [rows("real/table_real_scores", scores=one, method="clip")["recall_1"].iloc[0] for one in (COCO, THINGS)]
    assert f"| CLIP | {levels[0]:.1f} % | {levels[1]:.1f} % |" in text


def test_the_readmes_rec_table_is_that_of_the_run():
    text = prose("README.md")
    names = {"clip": "CLIP", "bsap": "BSAP, T = 1", "bsap_calibrated": "BSAP, T = 1, weight without labels",
             "bsap_h": "BSAP-H", "dn": "distribution normalization", "nnn": "NNN"}  # fmt: skip
    for method, name in names.items():
        interval = f"[{signed(rec('delta_ci_low', method))}, {signed(rec('delta_ci_high', method))}]"
        against = "" if method == "clip" else f"{signed(rec('delta_vs_clip', method))} {interval}"
        assert f"| {name} | {rec('accuracy', method):.1f} % | {against} |".replace("  |", " |") in text.replace(
            "|  |", "| |"
        )


def test_every_measured_number_of_the_readme_is_claimed():
    """A percentage or a number of points in the README's prose stands in a claim above."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    text = " ".join(" ".join(line for line in lines if not line.startswith("|")).split())
    numbers = set(re.findall(r"[−+]?\d+(?:\.\d+)? ?(?:%|points)", text)) - {"95 %", "20.6 %"}  # 20.6 %: the paper's own
    assert not {one for one in numbers if not any(one in words for where, words, _ in CLAIMS if where == "README.md")}
