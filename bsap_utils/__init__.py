"""BSAP (Balanced Similarity with Auxiliary Prompts): a training-free correction of CLIP's text-to-image retrieval bias.

Data flows one way: datasets → proposals → visual_prompts → scoring → normalization → evaluation → plotting.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the repository; notebooks and commands read relative paths from here
__version__ = "0.1.0"
