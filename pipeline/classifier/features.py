"""What a trained classifier makes of every plane of its series: computed once, kept on disk, one
file a series.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..learning.backbone import standardise
from ..learning.loaders import loaded, loading
from ..learning.optimise import autocast
from ..run import layout, room
from ..run.config import TrainConfig
from ..system.console import progress
from ..system.errors import InputError
from ..system.files import atomic_path, keep_only, remove_temporaries
from ..volumes.sampling import all_planes
from .data import Series
from .model import CnnLstm
from .regions import region_planes, region_windows

AT_ONCE = 64  # planes that go through the backbone together


def weights_digest(model: torch.nn.Module) -> str:
    """Hex digest of a model's tensors, whatever device they are on."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def in_parts(work: Callable[[Tensor], Tensor], planes: Tensor, size: int) -> Tensor:
    """What `work` makes of planes (N, ...), `size` at a time; the last part is filled up with its
    last plane, whose results are dropped.
    """
    if missing := -len(planes) % size:
        planes = torch.cat([planes, planes[-1:].expand(missing, *planes.shape[1:])])
    found = torch.cat([work(part) for part in planes.split(size)])
    return found[: len(found) - missing]


@torch.inference_mode()
def plane_features(model: CnnLstm, pictures: Tensor, amp: bool) -> Tensor:
    """Features (N, C) float16 on the CPU of planes (N * channels, H, W) uint8. What overflows in
    mixed precision is computed again in float32.
    """
    planes = standardise(pictures).unflatten(0, (-1, model.planes))
    # on a GPU parts of one size: cuDNN tries its ways for each size, and memory has a bound
    size = AT_ONCE if pictures.is_cuda else len(planes)
    with autocast(pictures.device, amp):
        found = in_parts(lambda part: model.features(part).half().cpu(), planes, size)
    if amp and not found.isfinite().all():
        return plane_features(model, pictures, amp=False)
    return found


def feature_file(folder: Path, series: Series) -> Path:
    """Where the features of a series lie: (N, C) float16, of all planes of its regions."""
    return folder / layout.volume_file(series.patient_id, series.series_id)


def read_features(folder: Path, series: Series) -> Tensor:
    """Features (N, C) float16 of a series.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = feature_file(folder, series)
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError) as fault:
        maker = layout.script(layout.CLASSIFIERS)
        raise InputError(
            "features missing or damaged", str(path), f"remove {folder} and run {maker} again"
        ) from fault


def require_room(
    model: CnnLstm, series: Sequence[Series], config: TrainConfig, folder: Path
) -> None:
    """Check that the disk has room for the features of `series` that `folder` has not.

    Raises:
        InputError: it has not.
    """
    need = 0
    for one in series:
        if not feature_file(folder, one).is_file():
            planes = region_planes(one.organs, len(one.planes), config)
            need += 128 + 2 * model.norm.normalized_shape[0] * sum(e - f for f, e in planes)
    room.require(folder, "features of all planes", disk=need)


class SeriesPlanes(Dataset):
    """Every plane (N * channels, h, w) uint8 of each series, with the number of the series."""

    def __init__(self, series: Sequence[Series], config: TrainConfig) -> None:
        self.series, self.config = series, config

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        series = self.series[index]
        volume = np.load(series.path, mmap_mode="r")
        windows = region_windows(series.organs, volume.shape, self.config)
        return index, all_planes(volume, self.config, windows)


def save_features(
    model: CnnLstm,
    series: Sequence[Series],
    config: TrainConfig,
    folder: Path,
    identity: str,
    waiting: Callable[[], object],
    sharing: int = 1,
) -> None:
    """Write the features of all planes of each series into `folder`, each file whole or not at all.
    What lies there of the same `identity` is kept, of another one removed. `waiting` is called
    between two series.
    """
    keep_only(folder, identity)
    remove_temporaries(folder)
    todo = [k for k, one in enumerate(series) if not feature_file(folder, one).is_file()]
    if not todo:
        return
    device = next(model.parameters()).device
    require_room(model, series, config, folder)
    planes = len(config.region_names) * len(series[0].planes)  # of a series, at most
    with loading():
        found = loaded(
            SeriesPlanes(series, config),
            len(todo),
            config.workers,
            planes * config.channels * config.image_size**2,
            "train.workers",
            pinned=device.type == "cuda",
            waiting=waiting,
            sharing=sharing,
            sampler=todo,
            batch_size=None,
        )
        for k, pictures in progress(found, len(todo), "features", "series"):
            features = plane_features(model, pictures.to(device, non_blocking=True), config.amp)
            with atomic_path(feature_file(folder, series[k])) as path, open(path, "wb") as handle:
                np.save(handle, features.numpy())
            waiting()
