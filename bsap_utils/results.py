"""The results page of a run, so that a reader on a code host sees its figures and tables without running anything.

`bsap run` calls `write_results_page` on the folder it wrote; `python -m bsap_utils.results` (part of `make figures`) puts the
sample's main table between the markers in the README.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from . import ROOT
from .plotting import METHOD_LABELS

CAPTIONS = {
    "fig_ranges": "Each region's range of logits over many texts, sorted; the mark is the text that is true of it.",
    "fig_range_distributions": "How means, spreads, minima and maxima of the regions' logits are distributed.",
    "fig_variance": "Variance of the logits explained by region, by text and by their interaction.",
    "fig_hubness": "How unequally the regions are retrieved, before and after the corrections (Lorenz curves).",
    "fig_hubs": "The regions that are retrieved most often.",
    "fig_clip_errors": "Right as a classifier, wrong as a retriever: what the right region says where CLIP errs.",
    "fig_hub_relations": "What goes with a region's bias: rank correlations with size, position, contrast and more.",
    "fig_sees_and_gains": "Points gained over CLIP, against how well a correction agrees with each region's mean logit.",
    "fig_worked_example": "BSAP step by step on one picture.",
    "fig_pool": "What a region's auxiliary logits are pooled to, from the maximum to the mean, as the temperature rises.",
    "fig_family": "Accuracy over temperature and weight on the split of choice, with the published methods where they lie.",
    "fig_family_test": "The same points on the split of report.",
    "fig_rec": "REC: accuracy of each method with its 95 % interval.",
    "fig_visual_prompts": "What CLIP can be shown of a region.",
    "fig_rec_scenes": "REC: scenes drawn at random that only BSAP or only CLIP gets right. White dashes: the truth.",
    "fig_rec_slices": "REC: where the difference comes from.",
    "fig_ris": "RIS: overall and mean IoU of each method with 95 % intervals.",
    "fig_ris_scenes": "RIS: masks chosen by CLIP and by BSAP, and the truth.",
    "fig_ris_curves": "RIS: precision over the IoU threshold, and the change per expression.",
    "fig_ablation_bank": "Accuracy of BSAP by bank of auxiliary prompts.",
    "fig_ablation_named": "Auxiliary prompts that the expression itself names, left out.",
    "fig_ablation_normalizer": "Accuracy by normalizer.",
    "fig_ablation_temperature": "Accuracy over the temperature.",
    "fig_ablation_hybrid": "Accuracy over the weight of BSAP-H.",
    "fig_ablation_visual_prompt": "Accuracy of CLIP and BSAP by visual prompt.",
    "fig_ablation_proposals": "Accuracy of CLIP and BSAP by proposals.",
    "fig_ablation_template": "Accuracy of CLIP and BSAP by text template.",
    "fig_ablation_choice": "What was chosen on val, reported on test.",
    "fig_ablation_size": "Accuracy over the number of auxiliary prompts; the band is the spread of 20 draws.",
    "fig_ablation_bank_temperature": "Accuracy over bank and temperature.",
    "fig_retrieval": "Retrieval: recall@1, 5, 10 and median rank of each method with 95 % intervals.",
    "fig_retrieval_top": "One description: the top five of the gallery under CLIP and under BSAP.",
    "fig_retrieval_hubness": "How unequally the gallery is retrieved, before and after (Lorenz curves).",
    "fig_retrieval_costs": "Time and memory of a plain and a balanced flat index (measured on the machine of the run).",
}
COLUMNS = {
    "table_rec.csv": ["split", "method", "n", "accuracy", "ci_low", "ci_high", "delta_vs_clip", "p_value"],
    "table_retrieval.csv": ["split", "kind", "method", "n", "recall_1", "recall_5", "recall_10", "median_rank"],
    "table_ris.csv": ["split", "method", "n", "oiou", "miou", "p50", "p70", "p90"],
}


def markdown_table(table: pd.DataFrame) -> str:
    """Return a frame as a Markdown table, methods by their names.

    >>> print(markdown_table(pd.DataFrame({"method": ["bsap"], "accuracy": [58.5]})))
    | method | accuracy |
    | --- | --- |
    | BSAP | 58.5 |
    """
    shown = table.assign(method=[METHOD_LABELS.get(name, name) for name in table["method"]])
    cells = [list(shown.columns), ["---"] * len(shown.columns), *shown.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def write_results_page(folder: Path) -> None:
    """Write README.md in a folder of figures: main tables, then every figure with its caption, by notebook."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    lines = [f"# Results: {folder.name}", "", "Written by the run; `manifest.json` says what made each file."]
    if any(entry["parameters"].get("DATASET") == "refshapes" for entry in manifest.values()):
        lines += [
            "",
            "`refshapes` is a generated sample, a model of the problem: nothing here is a claim about RefCOCO.",
        ]
    for notebook in sorted({entry["notebook"] for entry in manifest.values()}):
        stem = Path(notebook).stem
        lines += ["", f"## [{stem}](../../notebooks/{stem}.ipynb)"]
        names = [name for name, entry in manifest.items() if entry["notebook"] == notebook]
        order = {stem: place for place, stem in enumerate(CAPTIONS)}  # the order of the story; tables come first
        for name in sorted(names, key=lambda name: order.get(Path(name).stem, -1)):
            if name in COLUMNS:
                table = pd.read_csv(folder / name)
                lines += ["", markdown_table(table[[c for c in COLUMNS[name] if c in table]])]
            elif name.endswith(".png"):
                caption = CAPTIONS.get(
                    Path(name).stem, Path(name).stem.removeprefix("fig_").replace("_", " ").capitalize() + "."
                )
                lines += ["", f"![{caption}]({name})", "", f"*{caption}*"]
    text = "\n".join(lines) + "\n"
    (folder / ".README.md.part").write_text(text, encoding="utf-8")
    (folder / ".README.md.part").replace(folder / "README.md")


def paste_table(readme: Path, table: pd.DataFrame) -> None:
    """Put the last split of a REC table between the markers `<!-- table_rec -->` and `<!-- /table_rec -->` of a page."""
    last = table[table["split"] == table["split"].iloc[-1]]
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- table_rec -->\n")
    _, closing, after = rest.partition("<!-- /table_rec -->")
    if not closing:
        raise ValueError(
            f"{readme}: the markers <!-- table_rec --> and <!-- /table_rec --> are missing; put them back."
        )
    shown = markdown_table(last[COLUMNS["table_rec.csv"]])
    readme.write_text(f"{before}<!-- table_rec -->\n{shown}\n{closing}{after}", encoding="utf-8")


if __name__ == "__main__":
    paste_table(ROOT / "README.md", pd.read_csv(ROOT / "figures/sample/table_rec.csv"))
