"""Random damage to DICOM files, as bad disks, broken transfers and bad exporters do it."""

import numpy as np


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A copy of an explicit VR file with one damage: bytes flipped in pixels or header, a cut, a
    run deleted, repeated or zeroed.
    """
    data, kind = bytearray(data), rng.integers(6)
    pixels = data.rindex(b"\xe0\x7f\x10\x00")
    at, length = int(rng.integers(pixels, len(data))), int(rng.integers(1, 200))
    if kind == 0:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(pixels, len(data))] = rng.integers(256)
    elif kind == 1:
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(128, pixels + 12)] = rng.integers(256)
    elif kind == 2:
        del data[int(rng.integers(0, len(data))) :]
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = data[at : at + length]
    else:
        data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)
