"""Making one 2D-VoCo sample (crops of one volume) from our store against MONAI from nii.gz: `python
tests/benchmarks/voco_data.py`.

MONAI does what pretraining codes do at every access: load nii.gz, orient, scale intensity, crop
foreground, resize, crop. Ours maps a stored uint8 volume and cuts the crops, augmentation included.
Same volume, alternating, medians. Needs monai (the extra `bench`). The share of a training step
that waits for data is in every run's log.jsonl (`waiting`).
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from pipeline.run.config import Config
from pipeline.run.presets import load_config
from pipeline.system.console import timed
from pipeline.voco.crops import base_boxes, random_boxes
from pipeline.voco.data import VocoSamples
from pipeline.volumes.sampling import resize_planes


def write_volumes(folder: Path, config: Config, depth: int) -> None:
    """A body-like volume (depth x 512 x 512, HU, noise of 15 HU) as nii.gz, and what stage 02
    stores of it as .npy.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :512] - 256
    tissue = 50 + 800 * ndimage.gaussian_filter(
        rng.normal(size=(depth, 512, 512)).astype(np.float32), (2, 12, 12)
    )
    hu = np.where((x / 200) ** 2 + (y / 150) ** 2 < 1, tissue, -1000) + rng.normal(
        0, 15, (depth, 512, 512)
    )
    hu = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    nibabel.save(
        nibabel.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-0.8, -0.8, 2.0, 1.0])),
        folder / "volume.nii.gz",
    )
    grey = np.clip(np.rint((hu.astype(np.float32) + 150) * 255 / 400), 0, 255).astype(np.uint8)
    planes = grey[np.linspace(0, depth - 1, config.volume.depth).astype(int), 106:406, 56:456]
    np.save(folder / "volume.npy", resize_planes(planes, config.volume.height))


def monai_sample(path: Path, config: Config) -> Callable[[int], int]:
    """A function that makes the same crops of the nii.gz through MONAI's transforms; returns the
    count of voxels.
    """
    from monai import transforms as T

    options = config.pretrain
    size, S = options.image_size, options.slices
    load = T.Compose(
        [
            T.LoadImaged(keys="image", image_only=True),
            T.EnsureChannelFirstd(keys="image"),
            T.Orientationd(keys="image", axcodes="RAS"),
            T.ScaleIntensityRanged(
                keys="image", a_min=-150, a_max=250, b_min=0, b_max=1, clip=True
            ),
            T.CropForegroundd(keys="image", source_key="image", select_fn=lambda x: x > 0.1),
            T.Resized(keys="image", spatial_size=(size, size, S), mode="trilinear"),
        ]
    )

    def sample(seed: int) -> int:
        image = load({"image": str(path)})["image"]
        boxes = [
            *random_boxes(size, options.grid, options.random_crops, np.random.default_rng(seed)),
            *base_boxes(size, options.grid),
        ]
        crops = [
            T.SpatialCrop(roi_start=(x0, y0, 0), roi_end=(x1, y1, S))(image)
            for y0, x0, y1, x1 in boxes
        ]
        return sum(crop.numel() for crop in crops)

    return sample


def main() -> None:
    """Print one Markdown table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument(
        "--depth",
        type=int,
        default=320,
        help="slices of the scan (default: the mean of the competition's series)",
    )
    flags.add_argument("overrides", nargs="*", help="config overrides")
    options = flags.parse_intermixed_args()
    config = load_config("paper", options.overrides)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_volumes(folder, config, options.depth)
        samples = VocoSamples(folder, ["volume.npy"], config.pretrain, config.seed)
        theirs = monai_sample(folder / "volume.nii.gz", config)
        found: dict[str, list[float]] = {"MONAI from nii.gz": [], "ours": []}
        for seed in range(options.rounds + 1):
            (count, seconds), (own, own_seconds) = (
                timed(partial(theirs, seed)),
                timed(partial(samples.sample, 0, [seed, 0, 0])),
            )
            if count != own["crops"].size:
                raise SystemExit(f"not the same work: {count} and {own['crops'].size} voxels")
            found["MONAI from nii.gz"].append(seconds)
            found["ours"].append(own_seconds)
    medians = {kind: statistics.median(times[1:]) for kind, times in found.items()}
    print(
        f"{options.depth} x 512 x 512, crops {own['crops'].shape}\n\n| one sample | ms |\n|---|---|"
    )
    for kind, seconds in medians.items():
        print(f"| {kind} | {1000 * seconds:.1f} |")
    print(f"| ratio | {medians['MONAI from nii.gz'] / medians['ours']:.0f} x |")


if __name__ == "__main__":
    main()
