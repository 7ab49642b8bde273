"""The results page of a run, so that a reader on a code host sees its figures and tables without running anything.

`bsap run` calls `write_results_page` on the folder it wrote; `python -m bsap_utils.results` (part of `make figures`) makes the
thumbnails of the sample's notebooks and puts the generated parts, its main table and the list of notebooks, between their
markers in the README.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image

from . import ROOT
from .cli import declared
from .plotting import METHOD_LABELS, with_palette

CAPTIONS = {
    "fig_explore": "One scene, one expression: each region's logit, its bias and the corrected score.",
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
    "fig_hero": "A typical scene that only BSAP gets right, a typical one that only CLIP does, and why. Dashes: the truth.",
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
THUMBNAILS = {  # the figure that stands for a notebook; of one that is not named here, its first
    "01_similarity_range": "fig_ranges",
    "02_bsap_method": "fig_family",
    "03_rec": "fig_rec",
    "04_ris": "fig_ris_scenes",
    "05_ablations": "fig_ablation_bank_temperature",
    "06_retrieval": "fig_retrieval_top",
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
        answer = folder / f"answer_{stem}.md"
        lines += ["", answer.read_text(encoding="utf-8").strip()] if answer.exists() else []
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


def paste(text: str, marker: str, content: str) -> str:
    """Return a page with `content` between its markers, in lines of its own; ValueError where they are missing.

    >>> paste("One\\n<!-- two -->\\nold\\n<!-- /two -->\\nthree", "two", "new")
    'One\\n<!-- two -->\\nnew\\n<!-- /two -->\\nthree'
    """
    before, opening, rest = text.partition(f"<!-- {marker} -->\n")
    _, closing, after = rest.partition(f"<!-- /{marker} -->")
    if not closing:
        raise ValueError(f"the markers <!-- {marker} --> and <!-- /{marker} --> are missing; put them back")
    return f"{before}{opening}{content}\n{closing}{after}"


def rec_block(table: pd.DataFrame) -> str:
    """Return the last split of `evaluation.rec_table` in Markdown, as the README shows it: percent, percentage points, p."""
    last = table[table["split"] == table["split"].iloc[-1]]
    shown = pd.DataFrame({
        "method": last["method"], "accuracy, %": last["accuracy"].map("{:.1f}".format),
        "95 % interval": [f"{row.ci_low:.1f} to {row.ci_high:.1f}" for row in last.itertuples()],
        "against CLIP, points": last["delta_vs_clip"].map("{:+.1f}".format),
        "interval": [f"{row.delta_ci_low:+.1f} to {row.delta_ci_high:+.1f}" for row in last.itertuples()],
        "McNemar's p": last["p_value"].map("{:.2g}".format),
    })  # fmt: skip
    of_clip = shown["method"] == "clip"
    shown.loc[of_clip, ["against CLIP, points", "interval", "McNemar's p"]] = "–"
    return markdown_table(shown)


def answers_block(folder: Path) -> str:
    """Return the answer of each notebook that a folder of figures has, one a paragraph, led by the notebook's number."""
    answers = {
        path.stem.removeprefix("answer_"): path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("answer_*.md"))
    }
    return "\n\n".join(f"**[{stem[:2]}](notebooks/{stem}.ipynb)** {text.strip()}" for stem, text in answers.items())


def parameters_block(notebook: Path) -> str:
    """Return the parameters of a notebook as a Markdown table: name, default, meaning."""
    rows = [f"| `{name}` | `{one.source}` | {one.help} |" for name, one in declared(notebook).items()]
    return "\n".join(
        ["| parameter | default | meaning |", "| --- | --- | --- |", *(row.replace("\n", " ") for row in rows)]
    )


def notebooks_block(notebooks: Path, folder: Path) -> str:
    """Return a Markdown table of the notebooks: number and name, question, and the thumbnail that lies in `folder`.

    Links are relative to the repository. Raises ValueError for a notebook whose first cell asks no **Question.**
    """
    room = "&nbsp;" * 48  # code hosts shrink the pictures of a table to nothing, but not what cannot be broken
    lines = [f"| notebook | question | {room} |", "| --- | --- | --- |"]
    for path in sorted(notebooks.glob("*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        asked = re.search(r"\*\*Question\.\*\*\s+(.*?\?)", first, re.DOTALL)
        if not asked:
            raise ValueError(
                f"{path}: its first cell should have **Question.** and a sentence that ends with a question mark"
            )
        name = first.splitlines()[0].removeprefix("# ").split(": ")[0]
        link, thumbnail = f"notebooks/{path.name}", folder / f"thumb_{path.stem}.png"
        picture = f"[![{name}]({folder.relative_to(notebooks.parent).as_posix()}/{thumbnail.name})]({link})"
        question = " ".join(asked[1].split()).replace("|", "\\|")
        lines.append(f"| [{name}]({link}) | {question} | {picture if thumbnail.exists() else ''} |")
    return "\n".join(lines)


def write_thumbnails(folder: Path, size: tuple[int, int] = (240, 150), most: int = 30_000) -> None:
    """Make a small picture of one figure of each notebook in a folder of figures: thumb_<notebook>.png, of `most` bytes."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    figures: dict[str, list[str]] = {}
    for name in sorted(name for name in manifest if name.endswith(".png")):
        figures.setdefault(Path(manifest[name]["notebook"]).stem, []).append(name)
    for stem, names in figures.items():
        named = f"{THUMBNAILS.get(stem)}.png"
        picture = Image.open(folder / (named if named in names else names[0])).convert("RGB")
        picture.thumbnail(size, Image.Resampling.LANCZOS)
        target = folder / f"thumb_{stem}.png"
        for colours in (
            256,
            128,
            64,
            32,
            16,
        ):  # a photograph of 16 colours has half a byte a pixel, so the last one fits
            with_palette(picture, colours).save(target.with_suffix(".part"), "PNG", optimize=True)
            if target.with_suffix(".part").stat().st_size <= most:
                break
        target.with_suffix(".part").replace(target)


def refreshed(readme: str, folder: Path) -> str:
    """Return the README with all that is generated in it as the run in `folder` has it."""
    blocks = {
        "answers": answers_block(folder), "table_rec": rec_block(pd.read_csv(folder / "table_rec.csv")),
        "notebooks": notebooks_block(ROOT / "notebooks", folder), "parameters": parameters_block(ROOT / "notebooks/03_rec.ipynb"),
    }  # fmt: skip
    for marker, content in blocks.items():
        readme = paste(readme, marker, content)
    return readme


def main() -> None:
    """Bring what is generated in the README up to the sample run."""
    folder, readme = ROOT / "figures/sample", ROOT / "README.md"
    write_thumbnails(folder)
    text = refreshed(readme.read_text(encoding="utf-8"), folder)
    readme.with_suffix(".part").write_text(text, encoding="utf-8")
    readme.with_suffix(".part").replace(readme)


if __name__ == "__main__":
    main()
