"""BSAP (Balanced Similarity with Auxiliary Prompts): a training-free correction of CLIP's text-to-image retrieval bias.

The modules stand in the order of the data: datasets → regions → visual_prompts → scoring → normalization → evaluation →
plotting. The names that a notebook needs can be imported from here; their modules are loaded when they are asked for.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # the repository; notebooks and commands read relative paths from here
__version__ = "0.2.0"

_NAMES = {
    "datasets": ["DatasetError", "load_refer", "open_picture"],
    "regions": ["box_iou", "from_boxes", "from_masks", "ground_truth", "load_candidates", "pair_up", "whole_images"],
    "scoring": ["ClipScorer", "ModelError", "load_scorer"],
    "aux_prompts": ["auxiliary_prompts", "unlabelled_texts"],
    "normalization": ["METHODS", "bsap", "bsap_hybrid", "calibrated_weight", "pool", "shift_and_scale"],
    "evaluation": ["pick", "rec_table", "recall_table", "ris_table"],
    "stats": ["verdict"],
    "imbalance": ["region_share"],
    "retrieval": ["BalancedIndex"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["ROOT", "__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used, so that `bsap --help` does not wait for PyTorch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
