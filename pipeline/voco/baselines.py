"""What can be had without a network: 8 x 8 pictures of a crop and regression trees.

Two pictures: the silhouette (body or not) and the grey thumbnail, both as means over the slices of
a clip, as the network's features are. They are asked what the network is asked, on the same
held-out crops: what it has above them is due to more than the outline of the body or the grey of
its parts.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..volumes.sampling import resize_planes
from .crops import hits
from .data import EVALUATION, Batch, VocoSamples

CROPS = 8  # random crops of each held-out volume, the network's too
CELLS = 8  # of a picture's side
VOLUMES = 256  # training volumes that trees learn from, at most
DRAWS = 2  # of crops of each of them
ROWS = 4096  # crops that trees learn from, at most
TREES, LEAF = 50, 2

Picture = Callable[[np.ndarray, int], np.ndarray]
# crops (P, S, h, h), the number of groups of their slices, what is asked of each (groups * P, n)
Task = tuple[np.ndarray, int, np.ndarray]


def silhouette(crops: np.ndarray, groups: int) -> np.ndarray:
    """(P, S, h, h) uint8 -> (groups * P, 64), group by group: the share of slices in which a cell
    is body, that is to half or more brighter than black, as where volumes are built.
    """
    return _mean(np.round(_cells((crops > 0).astype(np.float32))), groups)


def thumbnail(crops: np.ndarray, groups: int) -> np.ndarray:
    """(P, S, h, h) uint8 -> (groups * P, 64), group by group: mean grey 0 to 255 of each cell."""
    return _mean(_cells(crops.astype(np.float32)), groups)


PICTURES: dict[str, Picture] = {"silhouette": silhouette, "thumbnail": thumbnail}


def _cells(crops: np.ndarray) -> np.ndarray:
    """(P, S, h, h) float32 -> (P, S, 64): means over cells of equal area."""
    small = resize_planes(crops.reshape(-1, *crops.shape[2:]), CELLS)
    return small.reshape(*crops.shape[:2], -1)


def _mean(cells: np.ndarray, groups: int) -> np.ndarray:
    """(P, S, 64) -> (groups * P, 64): the mean over each group of slices, group by group."""
    P, S, n = cells.shape
    return cells.reshape(P, groups, S // groups, n).mean(2).swapaxes(0, 1).reshape(-1, n)


def regressed(
    training: VocoSamples, held: VocoSamples, ask: Callable[[Batch], Task]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What is asked of the held-out crops, (N, n), and what trees say of it by the name of the
    picture that they see, (N, n); they learn from crops of training volumes. `ask` makes the task
    out of what `VocoSamples.sample` gives.
    """
    from sklearn.ensemble import ExtraTreesRegressor

    rng = np.random.default_rng([training.seed, EVALUATION])
    seen, wanted = _pictures(map(ask, _training(training, rng)))
    rows = rng.permutation(len(wanted))[:ROWS]
    shown, truth = _pictures(map(ask, _held_out(held)))
    found = {}
    for name in PICTURES:
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, random_state=training.seed)
        asked = wanted[rows].ravel() if wanted.shape[1] == 1 else wanted[rows]
        said = trees.fit(seen[name][rows], asked).predict(shown[name])
        found[name] = said.reshape(truth.shape)
    return truth, found


def _pictures(tasks: Iterable[Task]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pictures (N, 64) by name and what is asked (N, n); the crops themselves are not kept."""
    rows: list[tuple[np.ndarray, ...]] = [
        (*(picture(crops, groups) for picture in PICTURES.values()), wanted)
        for crops, groups, wanted in tasks
    ]
    *pictures, asked = (np.concatenate(column) for column in zip(*rows, strict=True))
    return dict(zip(PICTURES, pictures, strict=True)), asked


def _training(samples: VocoSamples, rng: np.random.Generator) -> Iterator[Batch]:
    for index in rng.permutation(len(samples.paths))[:VOLUMES].tolist():
        for draw in range(DRAWS):
            seeds = [samples.seed, EVALUATION, index, 1 + draw]
            yield samples.sample(index, seeds, CROPS, augment=False)


def _held_out(samples: VocoSamples) -> Iterator[Batch]:
    """The crops of `evaluation_batches`."""
    for index in range(len(samples.paths)):
        yield samples.sample(index, [samples.seed, EVALUATION, index], CROPS, augment=False)


def position_accuracies(training: VocoSamples, held: VocoSamples) -> dict[str, float]:
    """`<picture>_<figure>` for the figures of `hits`: trees regress the overlap with each base
    crop, and the largest is chosen.
    """
    Z = held.config.z_bins
    overlap, found = regressed(
        training, held, lambda sample: (sample["crops"][:CROPS], Z, sample["overlap"])
    )
    return {
        f"{name}_{figure}": float(right.mean())
        for name, said in found.items()
        for figure, right in hits(said.argmax(1), overlap, Z).items()
    }
