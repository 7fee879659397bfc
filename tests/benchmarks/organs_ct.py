"""Segmenters on real CT: `python tests/benchmarks/organs_ct.py FOLDER OUT --models RUN --labels
SERIES=FILE ...`.

FOLDER and `--labels` are those of `probes_ct.py`. The segmenters of all folds of RUN, which may
have seen phantoms alone, label every series of OUT that has a label map, on the grid of its volume.
Prints Dice and draws what was found in colour and the label map in white (OUT/SERIES.png). An
observation on as many patients as there are.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import torch
from probes_ct import make_volumes

from pipeline.organs.figures import draw_strip
from pipeline.organs.files import mask_files
from pipeline.organs.find import OrganFinder, label_volume, without_islands
from pipeline.organs.loss import dice_scores
from pipeline.organs.masks import ORGANS, slice_table, store_mask, with_masks
from pipeline.run import layout
from pipeline.run.presets import load_config


def main() -> None:
    """Print one Markdown table."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folder", type=Path)
    flags.add_argument("out", type=Path)
    flags.add_argument("--models", type=Path, required=True, help="a finished run with organs")
    flags.add_argument("--labels", nargs="+", default=[], metavar="SERIES=FILE")
    options = flags.parse_args()
    data = make_volumes(options.folder, options.labels, options.out)
    volumes, masks = options.out / layout.VOLUMES, options.out / "masks"
    masks.mkdir(exist_ok=True)
    paths = sorted((options.models / layout.ORGANS).glob(f"fold*/{layout.MODEL}"))
    finder, config = OrganFinder(paths, torch.device("cpu")), load_config("demo", [])
    index = pl.read_parquet(volumes / layout.INDEX)
    slices = pl.read_parquet(slice_table(volumes, options.out / layout.SLICES))
    print(f"\n| series | {' | '.join(ORGANS)} |\n{'|---' * (1 + len(ORGANS))}|")
    for item in with_masks(mask_files(data), index, slices):
        row = item[2]
        truth = np.load(masks / store_mask(item, masks, config.volume, config.convert.max_pixels))
        volume = np.load(volumes / row["path"])
        with torch.inference_mode():
            labels = label_volume(finder.models, volume, finder.options, finder.device)
        found = without_islands(labels)
        dice = dice_scores(found, truth, len(ORGANS))
        draw_strip(volume, found, truth, options.out / f"{row['series_id']}.png")
        texts = ["not there" if one is None else f"{one:.3f}" for one in dice]
        print(f"| {row['patient_id']} | {' | '.join(texts)} |", flush=True)


if __name__ == "__main__":
    main()
