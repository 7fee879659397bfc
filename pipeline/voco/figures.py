"""Pictures of pretraining: crops with their labels, similarity maps before and after."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..learning.checkpoint import load_checkpoint
from ..learning.distributed import World
from ..run import layout
from ..run.config import Config
from ..system.frames import read_frame
from ..system.pictures import write_picture
from .crops import base_boxes, cut, overlap_labels, random_boxes
from .data import EVALUATION, VocoSamples, choose_volumes
from .losses import similarity
from .model import VocoNet
from .step import start
from .voco2d import Voco2D

COLOURS = ("tab:orange", "tab:cyan", "tab:pink", "tab:olive")
CROPS_SHOWN = 4  # random crops
WINDOWS = 9  # positions an axis of the similarity maps


def draw_all(
    config: Config,
    volumes: Path,
    folder: Path,
    device: torch.device,
    excluded: frozenset[str] = frozenset(),
) -> list[str]:
    """Write crops.png and similarity.png into `folder` where the method compares places; returns
    their names.
    """
    options = config.pretrain
    if options.method != "voco2d":
        return []
    index = read_frame(volumes / layout.INDEX)
    _, held = choose_volumes(index, options, config.seed, excluded)
    middle = np.zeros(2) if options.window else None
    planes = VocoSamples(volumes, held, options, config.seed).planes(0, draw=middle)
    rng = np.random.default_rng([config.seed, EVALUATION])
    boxes = random_boxes(options.image_size, options.grid, CROPS_SHOWN, rng)
    run = start(config, World(0, 1, device))
    assert isinstance(run.method, Voco2D)
    maps = [similarity_maps(run.method.teacher, planes, boxes, device)]
    if state := load_checkpoint(folder / layout.BEST):
        run.restore(state)
    maps.append(similarity_maps(run.method.teacher, planes, boxes, device))
    draw_crops(planes, boxes, base_boxes(options.image_size, options.grid), folder / "crops.png")
    draw_similarity(planes, boxes, maps, folder / "similarity.png")
    return ["crops.png", "similarity.png"]


@torch.no_grad()
def similarity_maps(
    net: VocoNet, planes: np.ndarray, boxes: np.ndarray, device: torch.device
) -> np.ndarray:
    """Similarity of each box's crop to crops at `WINDOWS` x `WINDOWS` places of the same volume:
    (R, WINDOWS, WINDOWS).
    """
    side, size = boxes[0, 2] - boxes[0, 0], planes.shape[-1]
    starts = np.linspace(0, size - side, WINDOWS).round().astype(int)
    corners = np.stack(np.meshgrid(starts, starts, indexing="ij"), -1).reshape(-1, 2)
    windows = np.concatenate([boxes, np.concatenate([corners, corners + side], 1)])
    crops = torch.from_numpy(cut(planes, windows)).to(device)
    # (G, R + windows, E)
    embeddings = torch.cat([net.eval()(part[None]) for part in crops.split(16)], 2)[0]
    found = similarity(embeddings[:, : len(boxes)], embeddings[:, len(boxes) :]).mean(0)
    return found.cpu().numpy().reshape(-1, WINDOWS, WINDOWS)


def draw_crops(planes: np.ndarray, boxes: np.ndarray, base: np.ndarray, path: Path) -> None:
    """The middle slice with its grid and random boxes; each base crop says how much of each random
    one lies in it.
    """
    figure, axes = _figure(1, 1, 4.5)
    _show(axes[0, 0], planes, "base crops, random crops and their labels")
    for box in base:
        _frame(axes[0, 0], box, "white", 0.8)
    for r, (box, labels) in enumerate(zip(boxes, overlap_labels(boxes, base), strict=True)):
        _frame(axes[0, 0], box, COLOURS[r % len(COLOURS)], 2.0)
        for k in np.flatnonzero(labels):
            y0, x0, y1, x1 = base[k]
            axes[0, 0].text(
                x0 + 0.05 * (x1 - x0),
                y0 + (r + 1) / (len(boxes) + 1) * (y1 - y0),
                f"{labels[k]:.2f}",
                color=COLOURS[r % len(COLOURS)],
                va="center",
                fontsize=9,
                weight="bold",
                # a frame of the same colour may pass behind the number
                path_effects=[withStroke(linewidth=4, foreground="black")],
            )
    write_picture(figure, path)


def draw_similarity(
    planes: np.ndarray, boxes: np.ndarray, maps: Sequence[np.ndarray], path: Path
) -> None:
    """One row a random crop: where it lies, and its similarity to crops all over the plane before
    and after training.
    """
    figure, axes = _figure(len(boxes), 1 + len(maps), 2.6)
    side, size = boxes[0, 2] - boxes[0, 0], planes.shape[-1]
    # of a map whose pixels have their centres where the windows have theirs
    edge = (side - (size - side) / (WINDOWS - 1)) / 2
    extent = (edge, size - edge, size - edge, edge)
    for r, box in enumerate(boxes):
        _show(axes[r, 0], planes, "crop")
        _frame(axes[r, 0], box, COLOURS[r % len(COLOURS)], 2.0)
        for column, (title, found) in enumerate(zip(("before", "after"), maps, strict=True), 1):
            _show(axes[r, column], planes, f"similarity {title}")
            axes[r, column].imshow(
                found[r],
                extent=extent,
                vmin=0,
                vmax=1,
                cmap="inferno",
                alpha=0.75,
                interpolation="bilinear",
            )
            axes[r, column].set(xlim=(0, size), ylim=(size, 0))
    write_picture(figure, path)


def _figure(rows: int, columns: int, size: float) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), `size` inches each."""
    figure = Figure((size * columns, size * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axis: Axes, planes: np.ndarray, title: str) -> None:
    axis.imshow(
        planes[len(planes) // 2],
        cmap="gray",
        vmin=0,
        vmax=255,
        extent=(0, planes.shape[2], planes.shape[1], 0),
    )
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def _frame(axis: Axes, box: np.ndarray, colour: str, width: float) -> None:
    """The outline of a box (y0, x0, y1, x1), whole at the plane's edge too."""
    y0, x0, y1, x1 = box.tolist()
    outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=width)
    axis.add_patch(outline).set_clip_on(False)
