"""Sentences that notebooks print under their figures, built from the numbers of the run: their wording follows the signs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .analysis import best_level
from .evaluation import ORACLE

_SAID = {"clip": "CLIP", "bsap": "BSAP", "bsap_h": "BSAP-H", "bsap_minmax": "BSAP min–max", "bsap_zscore": "BSAP z-score",
         "dn": "distribution normalization", "nnn": "NNN", "qb_norm": "QB-Norm"}  # fmt: skip


def ris_reading(table: pd.DataFrame, predictions: pd.DataFrame, compared: str, where: str) -> str:
    """Say in words what `ris_table` of one split and its predictions show; every figure and its sign come from them."""
    row = table.set_index("method")
    clip, other, best = row.loc["clip"], row.loc[compared], row.loc[ORACLE]
    name = _SAID.get(compared, compared)

    def change(measure: str, label: str) -> str:
        delta, low, high = (
            other[f"delta_{measure}_vs_clip"],
            other[f"delta_{measure}_low"],
            other[f"delta_{measure}_high"],
        )
        clear = "more" if low > 0 else "less" if high < 0 else None
        said = (
            f"{abs(delta):.1f} points {clear}"
            if clear
            else f"{delta:+.1f} points, which so few pictures cannot tell from 0"
        )
        return f"{label} {other[measure]:.1f} % ({said}; interval {low:+.1f} to {high:+.1f})"

    iou = predictions.pivot(index="sent_id", columns="method", values="iou")
    better, worse = (iou[compared] > iou["clip"]).mean(), (iou[compared] < iou["clip"]).mean()
    oiou, miou = (_SAID.get(best_of, best_of) for best_of in row.drop(ORACLE)[["oiou", "miou"]].idxmax())
    leaders = f"The highest oIoU is that of {oiou}, the highest mIoU {'too' if oiou == miou else 'that of ' + miou}."
    return (
        f"On {where} CLIP reaches oIoU {clip['oiou']:.1f} % and mIoU {clip['miou']:.1f} %. Against that {name} has "
        f"{change('oiou', 'oIoU')} and {change('miou', 'mIoU')}. {leaders} The best candidate of every picture would "
        f"give oIoU {best['oiou']:.1f} % and mIoU {best['miou']:.1f} %: of the mIoU that choosing can reach, {name} has "
        f"{100 * other['miou'] / best['miou']:.0f} %, CLIP {100 * clip['miou'] / best['miou']:.0f} %. {name}'s mask is the "
        f"better one for {100 * better:.1f} % of the expressions, CLIP's for {100 * worse:.1f} %; for the rest they are "
        "equally good."
    )


def ris_conclusion(table: pd.DataFrame, compared: str, dataset: str) -> str:
    """Say what all splits of `ris_table` allow to conclude: whether they agree, and what limits the result."""
    name = _SAID.get(compared, compared)
    rows, clip, best = (table[table["method"] == method].set_index("split") for method in (compared, "clip", ORACLE))

    def verdict(measure: str, label: str) -> str:
        low, high = rows[f"delta_{measure}_low"], rows[f"delta_{measure}_high"]
        said = {
            split: "higher" if low[split] > 0 else "lower" if high[split] < 0 else "not told apart"
            for split in rows.index
        }
        if len(set(said.values())) == 1:
            word = next(iter(said.values()))
            return f"{label} is {word} {'from' if 'apart' in word else 'than'} CLIP's on {' and '.join(said)}"
        return f"{label}, against CLIP's, is " + ", ".join(f"{what} on {split}" for split, what in said.items())

    lost = [100 - best["miou"].mean(), best["miou"].mean() - rows["miou"].mean()]
    larger = "the choice" if lost[1] > lost[0] else "the segmenter's masks"
    text = (
        f"With 95 % intervals, {name}'s {verdict('oiou', 'oIoU')}; {verdict('miou', 'its mIoU')}. Of what lacks to mIoU 100 %, "
        f"{lost[0]:.1f} points are lost before any choice, because no candidate is the exact mask, and {lost[1]:.1f} by choosing "
        f"(CLIP: {(best['miou'] - clip['miou']).mean():.1f}): {larger} cost{'s' if larger == 'the choice' else ''} more."
    )
    if dataset == "refshapes":
        text += " This is the bundled sample, generated scenes and a small CLIP: no claim about RefCOCO."
    return text


def family_reading(accuracy: pd.DataFrame, unclear: np.ndarray, places: pd.DataFrame, left: float, nearest: int) -> str:
    """Return what the map of weights (index) × temperatures (columns) shows; its wording follows the numbers.

    `unclear` [W, T]: not told from the best. `places`: label, temperature, weight, approximate; the last row is the best.
    `left` is the second value of `matching_temperature`, for the approximate place of NNN with k = `nearest`.
    """

    def named(temperature: float) -> str:
        return "∞" if np.isinf(temperature) else f"{temperature:.3g}"

    finite, chosen = np.log(accuracy.columns[:-1].to_numpy(float)), places.iloc[-1]
    said: dict[bool, list[str]] = {True: [], False: []}
    for place in places.iloc[:-1].itertuples():
        infinite = np.isinf(place.temperature)
        column = len(finite) if infinite else np.abs(finite - np.log(place.temperature)).argmin()
        row = np.abs(accuracy.index.to_numpy() - place.weight).argmin()
        said[bool(unclear[row, column])].append(f"{place.label} ({accuracy.iloc[row, column]:.1f} %)")
    text = (f"The best setting is T = {named(chosen.temperature)}, w = {chosen.weight:g}, with "
            f"{accuracy.to_numpy().max():.1f} %. {100 * unclear.mean():.0f} % of the map cannot be told from it (white "
            f"outline). In there: {', '.join(said[True]) or 'no published method'}; outside: "
            f"{', '.join(said[False]) or 'none'}.")  # fmt: skip
    if chosen.weight in (accuracy.index[0], accuracy.index[-1]):
        text += f" The best lies on the map's edge, w = {chosen.weight:g}: a weight beyond it might be better still."
    for place in places[places["approximate"]].itertuples():
        text += (f" NNN's mark is at T = {named(place.temperature)}, where the pool differs from the mean of the {nearest} "
                 f"largest by {100 * left:.1f} % of that mean's variance within images.")  # fmt: skip
    return text


def plain_reading(row: pd.Series, split: str) -> str:
    """Return how BSAP does against CLIP, from its row of an `ablation_table`; what contradicts the method comes first."""
    text = ""
    if row.delta_ci_low <= 0:
        text = f"**On {split} BSAP is {'not told from' if row.delta_ci_high >= 0 else 'worse than'} CLIP.** "
    return (f"{text}On {split} BSAP (T = 1, w = 1) is right for {row.accuracy:.1f} % of the expressions and CLIP for "
            f"{row.clip_accuracy:.1f} %: {row.delta_vs_clip:+.1f} points (95 % interval {row.delta_ci_low:+.1f} to "
            f"{row.delta_ci_high:+.1f}).")  # fmt: skip


def chosen_reading(table: pd.DataFrame, chosen_on: str, reported_on: str, row: int = -1) -> str:
    """Return what became of the setting in `row`, chosen on one split, on another: from an `ablation_table`, BSAP first.

    Column accuracy_where_chosen is each row's accuracy on `chosen_on`.
    """
    first, last, best = table.iloc[0], table.iloc[row], table.iloc[table["accuracy"].argmax()]
    text = plain_reading(first, reported_on)
    text += (f" *{last.level}* had {last.accuracy_where_chosen:.1f} % on {chosen_on}, and has {last.accuracy:.1f} % on "
             f"{reported_on} ({last.accuracy - last.accuracy_where_chosen:+.1f}; BSAP moved by "
             f"{first.accuracy - first.accuracy_where_chosen:+.1f}). Against CLIP that is {last.delta_vs_clip:+.1f} points "
             f"({last.delta_ci_low:+.1f} to {last.delta_ci_high:+.1f}), against BSAP {last.delta_vs_default:+.1f} "
             f"({last.default_ci_low:+.1f} to {last.default_ci_high:+.1f}): ")  # fmt: skip
    if last.default_ci_low > 0:
        text += "choosing it on other images pays here."
    elif last.default_ci_high < 0:
        text += "choosing it on other images does harm here."
    else:
        text += "what the choice brings is within chance here."
    return f"{text} The highest on {reported_on}, found after the fact, is {best.level} with {best.accuracy:.1f} %."


def ablation_reading(table: pd.DataFrame, factor: str, default: int = 0) -> str:
    """Return a few sentences on what an `ablation_table` shows; their wording follows the numbers.

    The default is row `default`; the best and the worst level are those of this table, found after the fact.
    """
    best, worst, usual = (table.iloc[row] for row in (best_level(table, default), table["accuracy"].argmin(), default))
    text = (f"**{factor}.** Accuracy is highest with *{best.level}* ({best.accuracy:.1f} %) and lowest with *{worst.level}* "
            f"({worst.accuracy:.1f} %). ")  # fmt: skip
    far = worst if best.name == usual.name else best
    gap = f"{far.delta_vs_default:+.1f} points (95 % interval {far.default_ci_low:+.1f} to {far.default_ci_high:+.1f})"
    if far is worst:
        text += f"The highest is the default; the lowest is {gap} from it."
    else:
        luck = "more than chance, though picked as the highest" if far.default_ci_low > 0 else "it may be chance"
        text += f"From the default, *{usual.level}* ({usual.accuracy:.1f} %), to the highest it is {gap}: {luck}."
    sure = table["p_holm"] < 0.05
    better, worse = (int((sure & (sign * table["delta_vs_clip"] > 0)).sum()) for sign in (1, -1))
    return (f"{text} CLIP at the same level is beaten in {better} of {len(table)} cases and beats the correction in {worse} "
            "(Holm-corrected p < 0.05).")  # fmt: skip


def sizes_reading(table: pd.DataFrame) -> str:
    """Return what the number of auxiliary prompts does.

    `table` has bank, size, accuracy, clip_accuracy, draw_low and draw_high; the largest size of a bank is all of it.
    """
    clip, parts, above = table["clip_accuracy"].iloc[0], [], 0
    for bank, part in table.groupby("bank", sort=False):
        one, full = part.iloc[0], part.iloc[-1]
        near = (part["accuracy"] - full["accuracy"]).abs() <= 1
        enough = part.loc[near[::-1].cummin()[::-1], "size"].min()
        parts.append(f"{bank}: one prompt {one.draw_low:.1f} to {one.draw_high:.1f} % over the draws, all {full['size']} "
                     f"{full.accuracy:.1f} %, within a point of that from {enough} on")  # fmt: skip
        above += full.ci_low > clip
    return (f"**Number.** CLIP has {clip:.1f} %. BSAP by bank: {'; '.join(parts)}. With all prompts the interval of {above} of "
            f"{len(parts)} banks lies above CLIP's accuracy.")  # fmt: skip


def cross_reading(cross: pd.DataFrame) -> str:
    """Return whether banks want different temperatures: `ablation_table`s by temperature, default "1", with a column bank."""
    best = cross.loc[cross.groupby("bank", sort=False)["accuracy"].idxmax()]
    said = [f"{row.bank} T = {row.temperature} ({row.accuracy:.1f} %"
            + (")" if row.temperature == "1" else f"; {row.delta_vs_default:+.1f} points from T = 1, 95 % interval "
               f"{row.default_ci_low:+.1f} to {row.default_ci_high:+.1f})") for row in best.itertuples()]  # fmt: skip
    span = cross.groupby("temperature", sort=False)["accuracy"].agg(lambda part: part.max() - part.min())
    gains = int((best["default_ci_low"] > 0).sum())
    text = (f"**Bank × temperature.** Best for {', for '.join(said)}. The gain over T = 1 is beyond chance for {gains} of "
            f"{len(best)} banks, not counting that the best was picked. The best and the worst bank are {span['1']:.1f} points "
            f"apart at T = 1, {span.min():.1f} at T = {span.idxmin()} (least) and {span.max():.1f} at T = {span.idxmax()} "
            "(most).")  # fmt: skip
    return text.replace("T = inf", "T = ∞")


# The answers of the notebooks, two sentences each. They are built from tables that are committed with the figures, so that a
# test can build them again. What a row is compared with stands in its columns delta_vs_clip, delta_ci_low and delta_ci_high.


def _place(dataset: str, split: str) -> str:
    return f"On the bundled sample ({dataset} {split})" if dataset == "refshapes" else f"On {dataset} {split}"


def _verdict(row: pd.Series) -> str:
    said = "better than" if row.delta_ci_low > 0 else "worse than" if row.delta_ci_high < 0 else "not told from"
    return f"**{said} CLIP**"


def _gap(row: pd.Series) -> str:
    return f"{row.delta_vs_clip:+.1f} points, 95 % interval {row.delta_ci_low:+.1f} to {row.delta_ci_high:+.1f}"


def range_answer(
    shares: pd.DataFrame, changes: pd.DataFrame, sees: pd.DataFrame, where: tuple[str, str], bank: str
) -> str:
    """Return notebook 01's answer, from its tables variance, mean_removed and bias_sees; `where`: dataset and split."""
    region, without, bsap = (
        shares.loc["CLIP, in an image"],
        changes.loc["CLIP less each region's mean"],
        changes.loc["BSAP"],
    )
    harm = {"better": "and does harm", "worse": "and helps"}.get(
        _verdict(without)[2:].split()[0], "and is not shown to do harm"
    )
    return (
        f"{_place(*where)} {100 * region.region:.0f} % of what decides between the regions of an image is the region's own level "
        f"(95 % interval {100 * region.region_ci_low:.0f} to {100 * region.region_ci_high:.0f} %), which has nothing to do with "
        f"the text {harm}: without it, CLIP's accuracy changes by {_gap(without)}. A correction gains only what its bank sees of "
        f"that: BSAP's bias with the bank “{bank}” goes with the regions' levels at ρ = {sees['spearman'].iloc[0]:.2f} (1 would "
        f"be all), and BSAP is {_verdict(bsap)} ({_gap(bsap)})."
    )


def family_answer(table: pd.DataFrame, dataset: str, chosen_on: str, reported_on: str) -> str:
    """Return notebook 02's answer, from its table family_test, BSAP first and what was chosen last."""
    bsap, chosen = table.iloc[0], table.iloc[-1]
    return (
        "BSAP takes off each region's logit a soft maximum of its logits with auxiliary prompts, one point (T = 1, w = 1) of the "
        f"family s − w · pool_T(a) that holds the published corrections too. {_place(dataset, reported_on)} that point is "
        f"{_verdict(bsap)}, {bsap.accuracy:.1f} % against {bsap.clip_accuracy:.1f} % ({_gap(bsap)}), and the point that was best "
        f"on {chosen_on}, T = {float(chosen.temperature):.3g} and w = {chosen.weight:g}, is {_verdict(chosen)} with "
        f"{chosen.accuracy:.1f} % ({_gap(chosen)})."
    )


def rec_answer(table: pd.DataFrame, compared: str = "bsap", temperature: float = 1.0) -> str:
    """Return notebook 03's answer, from the last split of its table rec."""
    last = table[table["split"] == table["split"].iloc[-1]].set_index("method")
    row, best = last.loc[compared], last.loc[last["accuracy"].idxmax()]
    name, leader = (_SAID.get(str(one.name), str(one.name)) for one in (row, best))
    return (
        f"{_place(row.dataset, row.split)} {name} (T = {temperature:g}, bank “{row.aux_bank}”) is {_verdict(row)}: right for "
        f"{row.accuracy:.1f} % of {row.n:,} expressions, CLIP for {last.loc['clip', 'accuracy']:.1f} % ({_gap(row)}). Of "
        f"all {len(last)} methods {leader} comes out highest, found after the fact: {best.accuracy:.1f} % ({_gap(best)})."
    )


def ris_answer(table: pd.DataFrame, compared: str = "bsap") -> str:
    """Return notebook 04's answer, from the last split of its table ris."""
    last = table[table["split"] == table["split"].iloc[-1]].set_index("method")
    row, clip, best = last.loc[compared], last.loc["clip"], last.loc[ORACLE]
    said = []
    for measure, label in (("miou", "mean IoU"), ("oiou", "overall IoU")):
        columns = {
            f"delta_{measure}_{end}": f"delta_{to}"
            for end, to in (("low", "ci_low"), ("high", "ci_high"), ("vs_clip",) * 2)
        }
        change = row.rename(columns)
        said.append(
            f"by {label} {_verdict(change)} ({row[measure]:.1f} % against {clip[measure]:.1f} %, {_gap(change)})"
        )
    return (
        f"{_place(row.dataset, row.split)} {_SAID.get(compared, compared)} is {' and '.join(said)}. No method here improves a "
        f"mask, and the best candidate of every picture would have a mean IoU of {best['miou']:.1f} %: "
        f"{best['miou'] - row['miou']:.1f} points are lost by choosing, {100 - best['miou']:.1f} by the segmenter."
    )


def choice_answer(table: pd.DataFrame, dataset: str, chosen_on: str, reported_on: str) -> str:
    """Return notebook 05's answer, from its table ablation_choice: the defaults first, and one headline."""
    default, headline = table.iloc[0], table[table["headline"]].iloc[0]
    single = table[(table.index > 0) & ~table["level"].str.contains("×")]
    most = single.loc[single["delta_vs_default"].abs().idxmax()]
    text = (
        f"{_place(dataset, reported_on)} BSAP with its defaults is {_verdict(default)} ({_gap(default)}), and of the single "
        f"choices made on {chosen_on} the one that moves it most is *{most.level}*: {most.delta_vs_default:+.1f} points "
        f"({most.default_ci_low:+.1f} to {most.default_ci_high:+.1f}). "
    )
    if headline.name == default.name:
        return f"{text}Nothing that was tried was better on {chosen_on} than the defaults."
    return (
        f"{text}The setting that was best on {chosen_on}, *{headline.level}*, is {_verdict(headline)}: {headline.accuracy:.1f} % "
        f"against {headline.clip_accuracy:.1f} % ({_gap(headline)})."
    )


def retrieval_reading(table: pd.DataFrame, where: str, gallery: int) -> str:
    """Return what `evaluation.retrieval_table` of one split shows; signs and words follow the numbers."""
    row = table.set_index("method")
    clip, bsap = row.loc["clip"], row.loc["bsap"]
    told: dict[str, list[str]] = {"more": [], "less": []}
    for k in (1, 5, 10):
        for method, one in row.drop("clip").iterrows():
            low, high = one[f"delta_{k}_low"], one[f"delta_{k}_high"]
            if low > 0 or high < 0:
                told["more" if low > 0 else "less"].append(
                    f"{_SAID.get(str(method), method)} @{k} {one[f'delta_{k}']:+.1f}"
                )
    changes = [f"{bsap[f'delta_{k}']:+.1f} at {k} ({bsap[f'delta_{k}_low']:+.1f} to {bsap[f'delta_{k}_high']:+.1f})"
               for k in (1, 5, 10)]  # fmt: skip
    return (f"Of {clip.n:,.0f} descriptions of {where}, asked of {gallery:,} regions, CLIP has one that they describe at the top "
            f"for {clip.recall_1:.1f} %, among ten for {clip.recall_10:.1f} %; median rank {clip.median_rank:g}, BSAP's "
            f"{bsap.median_rank:g}. BSAP's recall less CLIP's, in points: {', '.join(changes)}. Clearly above CLIP (interval "
            f"without 0): {', '.join(told['more']) or 'none'}. Clearly below: {', '.join(told['less']) or 'none'}.")  # fmt: skip


def retrieval_answer(table: pd.DataFrame) -> str:
    """Return notebook 06's answer, from the last split of its table retrieval."""
    last = table[table["split"] == table["split"].iloc[-1]].set_index("method")
    clip, bsap = last.loc["clip"], last.loc["bsap"]

    def told(k: int) -> str:
        columns = {f"delta_{k}": "delta_vs_clip", f"delta_{k}_low": "delta_ci_low", f"delta_{k}_high": "delta_ci_high"}
        change = bsap.rename(columns)
        return f"recall@{k} {_verdict(change)} ({bsap[f'recall_{k}']:.1f} % against {clip[f'recall_{k}']:.1f} %, {_gap(change)})"

    return (
        f"{_place(bsap.dataset, bsap.split)}, with {clip.n:,} descriptions asked of {bsap.gallery:,} regions and the bank "
        f"“{bsap.aux_bank}”, BSAP has {told(1)} and {told(10)}. In a vector index it is one number an image, paid when "
        "images are added and not when they are searched for."
    )
