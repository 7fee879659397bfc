"""How fast stage 01 is, measured side by side in one run: `python tests/benchmarks/convert.py speed|processes|png|memory`.

speed      one core, RLE 512 x 512: series conversion against the usual converter (pydicom, numpy window, cv2.imwrite) and against
           decoding and encoding alone, alternating; the figures are ratios of medians
processes  slices/s of two processes against one
png        bytes and time of PNG strategies, filters and levels on the same windowed slices
memory     peak memory of converting 100 and 2,000 slices
"""

import argparse
import contextlib
import itertools
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import dicomsdl
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless
from scipy import ndimage

from pipeline import dicom, slice_store
from pipeline.config import ConvertConfig
from pipeline.parallel import spread
from pipeline.sources import SeriesTask

SIZE, CONFIG = 512, ConvertConfig()


def hounsfield(seed: int) -> np.ndarray:
    """A body-like ellipse of soft tissue, fat and bone with correlated noise of 15 HU, air around: (512, 512) in HU."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    tissue = 50 + 800 * ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 12)
    noise = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 0.7)
    hu = np.where((x / 200) ** 2 + (y / 150) ** 2 < 1, tissue, -1000) + 15 * noise / noise.std()
    return np.clip(np.rint(hu), -1024, 3071)


def write_dicom(path: Path, seed: int) -> None:
    """One RLE Lossless slice, 12 bits stored."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.InstanceNumber = CTImageStorage, f"2.25.{seed + 1}", seed + 1
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [-200, -200, -seed], [1, 0, 0, 0, 1, 0], [0.8, 0.8]
    ds.Rows = ds.Columns = SIZE
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.RescaleSlope, ds.RescaleIntercept = 1, "MONOCHROME2", 1, -1024
    ds.WindowCenter, ds.WindowWidth, ds.PatientPosition, ds.Modality, ds.KVP = [50, 400], [400, 1500], "HFS", "CT", 120
    ds.PixelData = (hounsfield(seed) + 1024).astype("<u2").tobytes()
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)


def make_series(data: Path, name: str, slices: int, different: int = 16) -> SeriesTask:
    """A series of `slices` files, `different` of them made and the others copies."""
    folder = data / "train_images" / "1" / name
    folder.mkdir(parents=True)
    for k in range(slices):
        if k < different:
            write_dicom(folder / f"{k + 1}.dcm", k)
        else:
            shutil.copy(folder / f"{k % different + 1}.dcm", folder / f"{k + 1}.dcm")
    return SeriesTask("1", name, "train", str(folder))


def usual(files: list[Path], target: Path, plugin: str) -> None:
    """What participants write, with pydicom's own RLE decoder ("pydicom", all that a plain installation has) or "pylibjpeg"."""
    for file in files:
        ds = pydicom.dcmread(file)
        ds.pixel_array_options(decoding_plugin=plugin)
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        image = (np.clip(hu, -150, 250) + 150) / 400 * 255
        cv2.imwrite(str(target / f"{file.stem}.png"), image.astype(np.uint8))


def alone(files: list[Path], pictures: list[np.ndarray], target: Path) -> None:
    """Decoding with dicomsdl and encoding with our encoder, file to file: no header, no checks, no window, no index."""
    for file, picture in zip(files, pictures, strict=True):
        dicomsdl.open_file(str(file)).pixelData(storedvalue=True)
        (target / f"{file.stem}.png").write_bytes(slice_store.encode_png(picture))


def alternate(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round, the works taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed(data: Path, rounds: int) -> None:
    """Ratios on one core."""
    cv2.setNumThreads(1)
    with contextlib.suppress(AttributeError):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    task = make_series(data, "1", 96)
    files = [Path(task.path) / f"{k}.dcm" for k in range(1, 97)]
    pictures = [dicom.picture(file.read_bytes(), CONFIG.max_pixels, False)[0] for file in files]
    other = data / "usual"
    other.mkdir()
    number = itertools.count()

    def new_folder() -> Path:
        folder = data / f"out{next(number)}"
        folder.mkdir()
        return folder

    works = {
        "stage 01": lambda: slice_store.convert_series(task, data, new_folder(), CONFIG),
        "usual converter": lambda: usual(files, other, "pydicom"),
        "usual converter with pylibjpeg": lambda: usual(files, other, "pylibjpeg"),
        "decoding and encoding alone": lambda: alone(files, pictures, other),
    }
    medians = {name: 1e3 * statistics.median(values) / len(files) for name, values in alternate(works, rounds).items()}
    for k, picture in enumerate(pictures):
        assert np.array_equal(cv2.imread(str(data / "out0" / "1" / "1" / f"{k + 1}.png"), cv2.IMREAD_UNCHANGED), picture)
    for name, value in medians.items():
        print(f"{name}: {value:.2f} ms a slice, {value / medians['stage 01']:.2f} x stage 01's time")


def _convert(task: SeriesTask, data: Path) -> None:
    slice_store.convert_series(task, data, data / "out", CONFIG)


def processes(data: Path, rounds: int) -> None:
    """Throughput of two processes against one, start-up of the workers not counted."""
    tasks = [make_series(data, str(k), 96, 8) for k in range(12)]
    (data / "out").mkdir()

    works = {jobs: (lambda jobs=jobs: list(spread(partial(_convert, data=data), tasks, jobs))) for jobs in (1, 2)}
    works[2]()
    seconds = alternate({str(jobs): work for jobs, work in works.items()}, rounds)
    one, two = (statistics.median(seconds[jobs]) for jobs in "12")
    print(f"one process {12 * 96 / one:.0f} slices/s, two {12 * 96 / two:.0f} slices/s, ratio {one / two:.2f}")


def png(data: Path, rounds: int) -> None:
    """Table of PNG settings."""
    pictures = [dicom.window(hounsfield(seed)) for seed in range(8)]
    settings: dict[str, list[int]] = {"OpenCV, its default": []}
    for strategy in ("DEFAULT", "FILTERED", "HUFFMAN_ONLY", "RLE", "FIXED"):
        for name in ("FILTER_SUB", "FILTER_UP", "FILTER_AVG", "FILTER_PAETH", "ALL_FILTERS"):
            for level in (1, 6) if strategy != "RLE" else (1,):  # the level goes first: it resets the strategy
                settings[f"OpenCV {strategy} {name} level {level}"] = [
                    cv2.IMWRITE_PNG_COMPRESSION, level, cv2.IMWRITE_PNG_STRATEGY, getattr(cv2, f"IMWRITE_PNG_STRATEGY_{strategy}"),
                    cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_{name}")]  # fmt: skip
    encoders = {key: (lambda picture, s=s: cv2.imencode(".png", picture, s)[1]) for key, s in settings.items()}
    encoders["ours (isal)"] = slice_store.encode_png
    seconds = alternate({key: (lambda e=e: [e(picture) for picture in pictures]) for key, e in encoders.items()}, rounds)
    for key in sorted(encoders, key=lambda key: statistics.median(seconds[key])):
        size = sum(len(encoders[key](picture)) for picture in pictures) / len(pictures)
        print(f"{key:46s} {size / 1e3:7.1f} kB {1e3 * statistics.median(seconds[key]) / len(pictures):6.2f} ms")


def memory(data: Path, rounds: int) -> None:
    """Peak resident memory of the converting process and of its children, each number of slices in a process of its own."""
    (data / "out").mkdir()
    for slices in (100, 2000):
        task = make_series(data, str(slices), slices)
        pid = os.fork()
        if pid == 0:
            slice_store.convert_series(task, data, data / "out", CONFIG)
            own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            print(f"{slices} slices: {own:.0f} MiB, decoding child {child:.0f} MiB", flush=True)
            os._exit(0)
        os.waitpid(pid, 0)


def main() -> None:
    """Run one mode in a temporary folder."""
    modes = {"speed": speed, "processes": processes, "png": png, "memory": memory}
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("mode", choices=modes)
    flags.add_argument("--rounds", type=int, default=7)
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        modes[options.mode](Path(folder), options.rounds)


if __name__ == "__main__":
    main()
