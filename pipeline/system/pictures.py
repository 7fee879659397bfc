"""Writing matplotlib figures: the same bytes for the same picture, never half a file."""

from pathlib import Path

from matplotlib.figure import Figure

from .files import atomic_path


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without the writer's name and version."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
