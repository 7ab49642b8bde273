"""BSAP (Balanced Similarity with Auxiliary Prompts): a training-free correction of CLIP's text-to-image retrieval bias.

The modules stand in the order of the data: datasets → regions → visual_prompts → scoring → normalization → evaluation →
plotting. The names that a notebook needs can be imported from here; their modules are loaded when they are asked for.
"""

from pathlib import Path

import lazy_loader

ROOT = Path(__file__).resolve().parents[1]  # the repository; notebooks and commands read relative paths from here
__version__ = "0.2.0"

__getattr__, __dir__, _names = lazy_loader.attach(__name__, submod_attrs={
    "datasets": ["DatasetError", "load_refer", "open_picture"],
    "regions": ["box_iou", "from_boxes", "from_masks", "ground_truth", "load_candidates", "pair_up", "whole_images"],
    "scoring": ["ClipScorer", "ModelError", "load_scorer"],
    "aux_prompts": ["auxiliary_prompts", "unlabelled_texts"],
    "normalization": ["METHODS", "bsap", "bsap_hybrid", "calibrated_weight", "pool", "shift_and_scale"],
    "evaluation": ["pick", "rec_table", "ris_table"],
    "stats": ["verdict"],
    "imbalance": ["region_share"],
    "retrieval": ["BalancedIndex"],
})  # fmt: skip
__all__ = ["ROOT", "__version__", *_names]
