"""Which organ masks a data folder holds; light to import, for a stage that is up to date."""

from pathlib import Path

from ..system.errors import InputError

FOLDER = "segmentations"
ENDINGS = (".nii.gz", ".nii")


def mask_files(data: Path) -> dict[str, Path]:
    """The mask files of a data folder by series id.

    Raises:
        InputError: two files for one series.
    """
    found: dict[str, Path] = {}
    folder = data / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        for ending in ENDINGS:
            if path.name.lower().endswith(ending):
                series = path.name[: -len(ending)]
                if series in found:
                    raise InputError(
                        f"two masks for series {series}",
                        f"{found[series]} and {path}",
                        "remove one of them",
                    )
                found[series] = path
                break
    return found
