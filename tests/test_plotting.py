"""Figures: what can be asserted about them without looking."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from bsap_utils.plotting import visual_prompt_sheet
from bsap_utils.proposals import decode_masks, ground_truth
from bsap_utils.visual_prompts import VISUAL_PROMPTS


def test_the_sheet_of_visual_prompts_has_every_prompt_of_every_region(sample):
    image_id = sample.images.index[3]
    regions = ground_truth(sample).query("image_id == @image_id").head(2)
    image = torch.from_numpy(np.asarray(sample.load_image(image_id)).copy()).permute(2, 0, 1)
    masks = torch.from_numpy(decode_masks(regions["segmentation"], 240, 320))
    boxes = torch.tensor(regions[["x", "y", "w", "h"]].to_numpy(np.float32))
    figure = visual_prompt_sheet(image, boxes, masks, ["first", "second"], grid=(8, 8))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["first", *VISUAL_PROMPTS, "second", *VISUAL_PROMPTS]
    pictures = np.stack([axis.images[0].get_array() for axis in figure.axes])
    different = len(np.unique(pictures.reshape(len(pictures), -1), axis=0))
    assert different == len(titles) - 1, "only the image is there twice"
    plt.close(figure)
