"""Hospitals of the phantom: a scanner, a protocol and habits each, whatever the labels."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft2

from .tissues import PHASES

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Hospital:
    """One scanner: `peak` (cycles per mm) of the noise power spectrum and `blur_mm` (standard
    deviation of an edge) make the kernel; `noise` is relative to the config's.
    """

    name: str
    peak: float
    blur_mm: float
    noise: float
    thickness_mm: float
    field: float  # of view, relative
    table: float  # bend of the table top
    arms: float  # share of patients with their arms beside the trunk
    timing: float  # -1..1: half a phase early or late


HOSPITALS = (
    Hospital("A", 0.12, 0.9, 0.85, 5.0, 1.0, 0.06, 0.15, 0.0),
    Hospital("B", 0.22, 0.7, 1.0, 3.0, 0.95, 0.10, 0.35, 0.3),
    Hospital("C", 0.35, 0.5, 1.2, 1.5, 1.06, 0.14, 0.25, -0.3),
    Hospital("D", 0.28, 0.6, 1.3, 1.0, 1.0, 0.18, 0.75, 0.15),
    Hospital("E", 0.16, 0.9, 0.95, 2.5, 1.1, 0.08, 0.5, -0.15),
)


def enhancement(phase: str, timing: float) -> list[float]:
    """HU of `TISSUES` in a phase, moved by `timing` towards the one before or after."""
    names = list(PHASES)
    place = float(np.clip(names.index(phase) + 0.5 * timing, 0, len(names) - 1))
    return [
        float(np.interp(place, range(len(names)), row))
        for row in zip(*PHASES.values(), strict=True)
    ]


def sub_planes(hospital: Hospital, dz: float) -> int:
    """Planes that one slice is the mean of, so that none is thicker than half the distance `dz` mm
    of the slices; 1 where the slice is thin beside that.
    """
    return int(np.clip(round(2 * hospital.thickness_mm / dz), 1, 4))


def blurred(hu: Array, hospital: Hospital, mm: float) -> Array:
    """Planes (D, H, W) with the edges of the kernel."""
    sigma = hospital.blur_mm / mm
    return hu if sigma < 0.3 else np.stack([cv2.GaussianBlur(p, (0, 0), sigma) for p in hu])


def noise(shape: tuple[int, ...], hospital: Hospital, mm: float, rng: np.random.Generator) -> Array:
    """Noise (D, H, W) of unit variance whose power rises with the frequency up to the kernel's peak
    (no further than 0.7 of the highest frequency that `mm` allows) and falls behind it.
    """
    peak = min(hospital.peak, 0.35 / mm)
    f = np.hypot(np.fft.fftfreq(shape[1], mm)[:, None], np.fft.rfftfreq(shape[2], mm))
    gain = ((f + 0.25 * peak) * np.exp(-0.5 * (f / peak) ** 2)).astype(np.float32)
    white = rng.standard_normal((2, shape[0], *gain.shape), dtype=np.float32)
    spectrum = np.empty(white.shape[1:], np.complex64)
    spectrum.real, spectrum.imag = white * gain
    drawn = irfft2(spectrum, s=shape[1:], workers=1)
    return drawn / drawn.std()
