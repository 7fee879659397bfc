"""Making one 2D-VoCo sample (crops of one volume) from our store against MONAI: `python
tests/benchmarks/voco_data.py`.

Twice MONAI: from nii.gz at every access, as pretraining codes do it (load, orient, scale intensity,
crop foreground, resize, crop), and with `PersistentDataset`, as its users run it, which keeps what
comes before the crops on disk as a tensor and reads that; filling it is not timed. Ours maps a
stored uint8 volume, resizes it and cuts the crops, augmentation included, which MONAI's two leave
out. Same volume, in turn, medians, files in the page cache. Needs monai (the extra `bench`). The
share of a training step that waits for data is in every run's log.jsonl (`waiting`).
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
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


def monai_datasets(scan: Path, cache: Path, config: Config) -> dict[str, Sequence[Any]]:
    """The scan, ready for crops, by row of the table: made at every access, and kept in `cache`."""
    from monai import data
    from monai import transforms as T

    size, S = config.pretrain.image_size, config.pretrain.slices
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
    scans = [{"image": str(scan)}]
    return {
        "MONAI from nii.gz": data.Dataset(scans, load),
        "MONAI PersistentDataset": data.PersistentDataset(scans, load, cache),
    }


def monai_sample(dataset: Sequence[Any], config: Config, seed: int) -> torch.Tensor:
    """The same crops as ours, (P, 1, h, w, S) float32."""
    from monai.transforms import SpatialCrop

    options, image = config.pretrain, dataset[0]["image"]
    size, S = options.image_size, options.slices
    boxes = [
        *random_boxes(size, options.grid, options.random_crops, np.random.default_rng(seed)),
        *base_boxes(size, options.grid),
    ]
    crops = [
        SpatialCrop(roi_start=(x0, y0, 0), roi_end=(x1, y1, S))(image) for y0, x0, y1, x1 in boxes
    ]
    return torch.stack([crop.as_tensor() for crop in crops])


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
        found, shape = measure(folder, config, options.rounds)
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    print(f"{options.depth} x 512 x 512, crops {shape}\n")
    print("| one sample | ms | times ours |\n|---|---|---|")
    for kind, seconds in medians.items():
        print(f"| {kind} | {1000 * seconds:.1f} | {seconds / medians['ours']:.1f} |")


def measure(
    folder: Path, config: Config, rounds: int
) -> tuple[dict[str, list[float]], tuple[int, ...]]:
    """Seconds of each sample by row of the table, all in turn, and the shape of our crops; the
    first round, which fills MONAI's cache, does not count.
    """
    samples = VocoSamples(folder, ["volume.npy"], config.pretrain, config.seed)
    datasets = monai_datasets(folder / "volume.nii.gz", folder / "cache", config)
    found: dict[str, list[float]] = {name: [] for name in (*datasets, "ours")}
    for seed in range(rounds + 1):
        own, seconds = timed(partial(samples.sample, 0, [seed, 0, 0]))
        found["ours"].append(seconds)
        for name, dataset in datasets.items():
            crops, seconds = timed(partial(monai_sample, dataset, config, seed))
            if crops.numel() != own["crops"].size:
                raise SystemExit(
                    f"{name}: {crops.numel()} voxels, ours {own['crops'].size}: not the same work"
                )
            found[name].append(seconds)
    return {name: times[1:] for name, times in found.items()}, own["crops"].shape


if __name__ == "__main__":
    main()
