"""How fast stage 01 is, measured side by side in one run: `python tests/benchmarks/convert.py
MODE`.

speed      one core, RLE 512 x 512: series conversion against the usual converter (pydicom, numpy
window, cv2.imwrite) and against
           decoding and encoding alone, alternating; the figures are ratios of medians
processes  slices/s of two processes against one png        bytes and time of PNG strategies,
filters and levels on the same windowed slices memory     peak memory of converting 100 and 2,000
slices damage     1,000 damaged files (RLE and JPEG 2000) among 200 good ones: wall time, worker
deaths, quarantine; good slices must be the same index      restart over 4,711 finished series of
1.5 million slices (sidecars without pictures): seconds and peak memory of the index

volume     one core: 320 slices of PNG to a volume against decoding the same PNGs alone, alternating

--slices N makes every mode smaller (or larger): N slices a series, N damaged files, N slices in
each of the 4,711 series.
"""

import argparse
import contextlib
import itertools
import json
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
import polars as pl
import pydicom
from damage import damaged
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from scipy import ndimage

from pipeline.run import layout
from pipeline.run.config import ConvertConfig, VolumeConfig
from pipeline.slices import dicom, window
from pipeline.slices import store as slice_store
from pipeline.slices.sources import SeriesTask, look_at
from pipeline.slices.store import convert_all
from pipeline.system.pool import spread
from pipeline.volumes.build import build_volume
from pipeline.volumes.store import read_slice

SIZE, CONFIG = 512, ConvertConfig()


def hounsfield(seed: int) -> np.ndarray:
    """A body-like ellipse of soft tissue, fat and bone with correlated noise of 15 HU, air around:
    (512, 512) in HU.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    tissue = 50 + 800 * ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 12)
    noise = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 0.7)
    hu = np.where((x / 200) ** 2 + (y / 150) ** 2 < 1, tissue, -1000) + 15 * noise / noise.std()
    return np.clip(np.rint(hu), -1024, 3071)


def write_dicom(path: Path, seed: int, syntax: str = RLELossless) -> None:
    """One losslessly compressed slice, 12 bits stored."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.InstanceNumber = (
        CTImageStorage,
        f"2.25.{seed + 1}",
        seed + 1,
    )
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
        ds.SOPClassUID,
        ds.SOPInstanceUID,
    )
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = (
        [-200, -200, -seed],
        [1, 0, 0, 0, 1, 0],
        [0.8, 0.8],
    )
    ds.Rows = ds.Columns = SIZE
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.RescaleSlope, ds.RescaleIntercept = (
        1,
        "MONOCHROME2",
        1,
        -1024,
    )
    ds.WindowCenter, ds.WindowWidth, ds.PatientPosition, ds.Modality, ds.KVP = (
        [50, 400],
        [400, 1500],
        "HFS",
        "CT",
        120,
    )
    ds.PixelData = (hounsfield(seed) + 1024).astype("<u2").tobytes()
    ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)


def make_series(
    data: Path, name: str, slices: int, different: int = 16, syntax: str = RLELossless
) -> SeriesTask:
    """A series of `slices` files, `different` of them made and the others copies."""
    folder = data / "train_images" / "1" / name
    folder.mkdir(parents=True)
    for k in range(slices):
        if k < different:
            write_dicom(folder / f"{k + 1}.dcm", k, syntax)
        else:
            shutil.copy(folder / f"{k % different + 1}.dcm", folder / f"{k + 1}.dcm")
    return SeriesTask("1", name, "train", str(folder))


def usual(files: list[Path], target: Path, plugin: str) -> None:
    """What participants write, with pydicom's own RLE decoder ("pydicom", all that a plain
    installation has) or "pylibjpeg".
    """
    for file in files:
        ds = pydicom.dcmread(file)
        ds.pixel_array_options(decoding_plugin=plugin)
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        image = (np.clip(hu, -150, 250) + 150) / 400 * 255
        cv2.imwrite(str(target / f"{file.stem}.png"), image.astype(np.uint8))


def alone(files: list[Path], pictures: list[np.ndarray], target: Path) -> None:
    """Decoding with dicomsdl and encoding with our encoder, file to file: no header, no checks, no
    window, no index.
    """
    for file, picture in zip(files, pictures, strict=True):
        dicomsdl.open_file(str(file)).pixelData(storedvalue=True)
        (target / f"{file.stem}.png").write_bytes(slice_store.encode_png(picture))


def alternate(
    works: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each work in each round, the works taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = clock()
            work()
            seconds[name].append(clock() - start)
    return seconds


def speed(data: Path, rounds: int, slices: int = 320) -> None:
    """Ratios on one core, for a series of the competition's mean length; all write new files."""
    cv2.setNumThreads(1)
    with contextlib.suppress(AttributeError):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    task = make_series(data, "1", slices)
    files = [Path(task.path) / f"{k}.dcm" for k in range(1, slices + 1)]
    pictures = [
        window.grey(dicom.picture(file.read_bytes(), CONFIG.max_pixels)[0]) for file in files
    ]
    number = itertools.count()

    def new_folder() -> Path:
        folder = data / f"out{next(number)}"
        folder.mkdir()
        return folder

    works = {
        "stage 01": lambda: slice_store.convert_series(task, data, new_folder(), CONFIG),
        "usual converter": lambda: usual(files, new_folder(), "pydicom"),
        "usual converter with pylibjpeg": lambda: usual(files, new_folder(), "pylibjpeg"),
        "decoding and encoding alone": lambda: alone(files, pictures, new_folder()),
    }
    medians = {
        name: 1e3 * statistics.median(values) / len(files)
        for name, values in alternate(works, rounds).items()
    }
    for k, picture in enumerate(pictures):
        assert np.array_equal(
            cv2.imread(str(data / "out0" / "1" / "1" / f"{k + 1}.png"), cv2.IMREAD_UNCHANGED),
            picture,
        )
    for name, value in medians.items():
        print(
            f"{name}: {value:.2f} ms a slice, {value / medians['stage 01']:.2f} x stage 01's time",
            flush=True,
        )


def _convert(task: SeriesTask, data: Path) -> None:
    slice_store.convert_series(task, data, data / "out", CONFIG)


def processes(data: Path, rounds: int, slices: int = 96) -> None:
    """Throughput of two processes against one, start-up of the workers not counted."""
    tasks = [make_series(data, str(k), slices, 8) for k in range(12)]
    (data / "out").mkdir()

    works = {
        jobs: lambda jobs=jobs: list(spread(partial(_convert, data=data), tasks, jobs))
        for jobs in (1, 2)
    }
    works[2]()
    seconds = alternate({str(jobs): work for jobs, work in works.items()}, rounds)
    one, two = (statistics.median(seconds[jobs]) for jobs in "12")
    print(
        f"one process {12 * slices / one:.0f} slices/s, two {12 * slices / two:.0f} slices/s, ratio"
        f" {one / two:.2f}"
    )


def png(data: Path, rounds: int, slices: int = 8) -> None:
    """Table of PNG settings."""
    pictures = [window.window(hounsfield(seed)) for seed in range(slices)]
    settings: dict[str, list[int]] = {"OpenCV, its default": []}
    for strategy in ("DEFAULT", "FILTERED", "HUFFMAN_ONLY", "RLE", "FIXED"):
        for name in ("FILTER_SUB", "FILTER_UP", "FILTER_AVG", "FILTER_PAETH", "ALL_FILTERS"):
            # the level goes first: it resets the strategy
            for level in (1, 6) if strategy != "RLE" else (1,):
                settings[f"OpenCV {strategy} {name} level {level}"] = [
                    cv2.IMWRITE_PNG_COMPRESSION,
                    level,
                    cv2.IMWRITE_PNG_STRATEGY,
                    getattr(cv2, f"IMWRITE_PNG_STRATEGY_{strategy}"),
                    cv2.IMWRITE_PNG_FILTER,
                    getattr(cv2, f"IMWRITE_PNG_{name}"),
                ]
    encoders = {
        key: lambda picture, s=s: cv2.imencode(".png", picture, s)[1] for key, s in settings.items()
    }
    encoders["ours (isal)"] = slice_store.encode_png
    seconds = alternate(
        {key: lambda e=e: [e(picture) for picture in pictures] for key, e in encoders.items()},
        rounds,
    )
    for key in sorted(encoders, key=lambda key: statistics.median(seconds[key])):
        size = sum(len(encoders[key](picture)) for picture in pictures) / len(pictures)
        print(
            f"{key:46s} {size / 1e3:7.1f} kB"
            f" {1e3 * statistics.median(seconds[key]) / len(pictures):6.2f} ms"
        )


def memory(data: Path, rounds: int, slices: int = 2000) -> None:
    """Peak resident memory of the converting process and of its children, each number of slices in
    a process of its own.
    """
    (data / "out").mkdir()
    for count in (slices // 20, slices):
        task = make_series(data, str(count), count)
        pid = os.fork()
        if pid == 0:
            slice_store.convert_series(task, data, data / "out", CONFIG)
            own, child = (
                resource.getrusage(who).ru_maxrss / 1024
                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            )
            print(f"{count} slices: {own:.0f} MiB, decoding child {child:.0f} MiB", flush=True)
            os._exit(0)
        os.waitpid(pid, 0)


def damage(data: Path, rounds: int, slices: int = 1000) -> None:
    """Convert good series with two processes, without and with damaged files among them."""
    tasks = [
        make_series(data, str(k), 50, 10, RLELossless if k % 2 else JPEG2000Lossless)
        for k in range(4)
    ]
    started = time.perf_counter()
    prints = [one.fingerprint for one in look_at(tasks, data)]
    clean = convert_all(tasks, prints, data, data / "clean", CONFIG, 2)
    middle = time.perf_counter()
    rng = np.random.default_rng(0)
    for k in range(slices):
        folder = Path(tasks[k % 4].path)
        (folder / f"{1000 + k}.dcm").write_bytes(
            damaged((folder / f"{k % 50 + 1}.dcm").read_bytes(), rng)
        )
    prints = [one.fingerprint for one in look_at(tasks, data)]
    begun = time.perf_counter()
    mixed = convert_all(tasks, prints, data, data / "mixed", CONFIG, 2)
    seconds, index = (
        time.perf_counter() - begun,
        pl.read_parquet(data / "mixed" / layout.INDEX),
    )
    for png in pl.read_parquet(data / "clean" / layout.INDEX)["png"]:
        assert (data / "clean" / png).read_bytes() == (data / "mixed" / png).read_bytes(), png
    assert len(index) + mixed["quarantined"] == clean["slices"] + slices
    print(
        f"{clean['slices']} good files: {middle - started:.1f} s; with {slices} damaged ones among"
        f" them: {seconds:.1f} s"
    )
    print(
        f"quarantined {mixed['quarantined']}, decoded all the same {len(index) - clean['slices']},"
        " good slices identical"
    )
    print(f"by reason: {mixed['by_reason']}; worker deaths: {mixed['worker_deaths'] or 'none'}")


def index(data: Path, rounds: int, slices: int = 319) -> None:
    """Restart over as many finished series as the competition has: every sidecar is read, index and
    quarantine are written.
    """
    tasks = [SeriesTask(str(10000 + k), str(k), "train", str(data / str(k))) for k in range(4711)]
    rows = {
        "instance_number": list(range(slices)),
        "order": list(range(slices)),
        "z_mm": [-0.8 * k for k in range(slices)],
        "rows": [SIZE] * slices,
        "cols": [SIZE] * slices,
        "spacing_y_mm": [0.78125] * slices,
        "spacing_x_mm": [0.78125] * slices,
        "flags": [""] * slices,
        "decoder": ["imagecodecs"] * slices,
        "transfer_syntax": [str(RLELossless)] * slices,
        "crc32": [3_000_000_000 + k for k in range(slices)],
    }
    for task in tasks:
        folder = data / "out" / task.name
        folder.mkdir(parents=True)
        names = [f"{task.name}/{k}.png" for k in range(slices)]
        sidecar = {
            "fingerprint": slice_store._fingerprint(task.series_id, CONFIG),
            "bytes": 1,
            "ignored": {},
            "deaths": [],
            "quarantine": [],
            "pictures": {},
        }
        (folder / slice_store.SIDECAR).write_text(
            json.dumps({**sidecar, "rows": {**rows, "png": names}})
        )
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter()
    counts = convert_all(tasks, [task.series_id for task in tasks], data, data / "out", CONFIG)
    seconds, peak = (
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    size = (data / "out" / layout.INDEX).stat().st_size / 1e6
    print(
        f"{counts['series']} series, {counts['slices']} rows: {seconds:.1f} s, peak {peak:.0f} MiB"
        f" ({before:.0f} before), {size:.1f} MB"
    )


def volume(data: Path, rounds: int, slices: int = 320) -> None:
    """PNG to volume against decoding the same PNGs alone, alternating: time of one core, so that
    other work on the machine counts little.
    """
    cv2.setNumThreads(1)
    with contextlib.suppress(AttributeError):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pictures = [window.window(hounsfield(seed)) for seed in range(16)]
    files = [data / f"{k}.png" for k in range(slices)]
    for k, file in enumerate(files):
        file.write_bytes(slice_store.encode_png(pictures[k % 16]))
    z_mm, config = -np.arange(slices, dtype=float), VolumeConfig()

    def built() -> object:
        images = (read_slice(file) for file in files)
        return build_volume(images, [(SIZE, SIZE)] * slices, z_mm, (0.8, 0.8), config)

    works = {"volume": built, "decoding alone": lambda: [read_slice(file) for file in files]}
    seconds = alternate(works, rounds, time.process_time)
    for name, values in seconds.items():
        print(f"{name}: {1e3 * statistics.median(values) / slices:.2f} ms of a core a slice")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Run one mode in a temporary folder."""
    modes = {mode.__name__: mode for mode in (speed, processes, png, memory, damage, index, volume)}
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("mode", choices=modes)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--slices", type=int)
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        modes[options.mode](
            Path(folder), options.rounds, **({"slices": options.slices} if options.slices else {})
        )


if __name__ == "__main__":
    main()
