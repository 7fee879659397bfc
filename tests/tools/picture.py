"""The README's picture: `python tests/tools/picture.py [FILE.png]`.

Six phantom patients, one a row, each of another hospital, from the diaphragm down to the pelvis.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from pipeline.competition.targets import TARGET_NAMES
from pipeline.phantom.anatomy import make_scan
from pipeline.phantom.hospitals import HOSPITALS
from pipeline.run.config import PhantomConfig

ROWS = {
    "no injury": {},
    "liver, high grade": {"liver": 2},
    "spleen, high grade": {"spleen": 2},
    "kidney, high grade": {"kidney": 2},
    "bowel injury": {"bowel": 1},
    "extravasation": {"liver": 1, "extravasation": 1},
}
PLANES, WIDE, HIGH = 8, 160, 120
LOW, HIGHEST = -150.0, 250.0  # HU


def row(name: str, labels: dict[str, int], index: int) -> np.ndarray:
    """(HIGH, PLANES * WIDE) uint8: planes from the first to the last that shows an organ."""
    config = PhantomConfig(image_size=256, slices_min=64, slices_max=64)
    healthy = dict.fromkeys(TARGET_NAMES, 0)
    hospital = HOSPITALS[index % len(HOSPITALS)]
    scan = make_scan(config, {**healthy, **labels}, (7, 0, index), 0, "portal", hospital)
    shown = np.flatnonzero(scan.masks.any(axis=(1, 2)))
    grey = np.clip((scan.hu - LOW) / (HIGHEST - LOW), 0, 1)
    planes = grey[np.linspace(shown[0], shown[-1], PLANES).round().astype(int)]
    cut = [p[32:224] for p in (planes * 255).astype(np.uint8)]
    line = np.hstack([cv2.resize(p, (WIDE, HIGH), interpolation=cv2.INTER_AREA) for p in cut])
    font = cv2.FONT_HERSHEY_SIMPLEX
    return cv2.putText(line, name, (4, 11), font, 0.36, 255, 1, cv2.LINE_AA)


def main() -> None:
    file = sys.argv[1] if len(sys.argv) > 1 else ".github/images/phantom.png"
    rows = [row(name, labels, k) for k, (name, labels) in enumerate(ROWS.items())]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(file, np.vstack(rows))


if __name__ == "__main__":
    main()
