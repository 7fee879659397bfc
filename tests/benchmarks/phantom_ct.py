"""How near the phantom is to real CT: `python tests/benchmarks/phantom_ct.py FOLDER`.

Each subfolder with DICOM files and each `NAME.nii.gz` in FOLDER is a series; `--labels` pairs a
series with a TotalSegmentator label map (NIfTI). Beside them stand phantom patients of 256 pixels,
one of each hospital. Prints a Markdown table: HU (mean and standard
deviation, liver, spleen and kidneys inside the masks, 4 mm from their edge), noise in the liver (mm
to mm variation, the local standard deviation in the plane), the frequency at which its power is
largest, and the width over which the skin rises from 10 to 90 percent.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from pipeline.competition.targets import TARGET_NAMES
from pipeline.phantom.anatomy import make_scan
from pipeline.phantom.hospitals import HOSPITALS
from pipeline.run.config import PhantomConfig

# numbers in the phantom's label maps and in TotalSegmentator's
PHANTOM = {"liver": (1,), "spleen": (2,), "kidneys": (3, 4)}
TOTAL = {"liver": (5,), "spleen": (1,), "kidneys": (2, 3)}
COLUMNS = ("liver", "spleen", "kidneys", "fat", "muscle", "noise", "peak", "edge")
SLICES = 24  # of a series
TILE_MM = 24.0  # of liver, for noise


def read_nifti(path):
    """Values (z down, y to the back, x to the left) and spacing (z, y, x) in mm."""
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.load(path))
    values = np.asarray(image.dataobj)[::-1, ::-1, ::-1].transpose(2, 1, 0)
    return values, image.header.get_zooms()[:3][::-1]


def read_dicom(folder):
    """HU and spacing of a series whose rows and columns run as usual."""
    import pydicom

    files = [pydicom.dcmread(path) for path in folder.glob("*.dcm")]
    files.sort(key=lambda ds: -float(ds.ImagePositionPatient[2]))
    hu = [ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in files]
    z = [float(ds.ImagePositionPatient[2]) for ds in files]
    return np.stack(hu), (abs(z[0] - z[-1]) / (len(z) - 1), *map(float, files[0].PixelSpacing))


def eroded(mask, spacing, mm):
    """The mask without `mm` at its edge in the plane."""
    disc = cv2.getStructuringElement(
        cv2.MORPH_ELLIPSE, (2 * max(1, round(mm / spacing[1])) + 1,) * 2
    )
    return np.stack([cv2.erode(plane, disc) for plane in mask.astype(np.uint8)]) > 0


def bulk(hu, spacing):
    """Fat, and muscle of the back: smooth places of their HU in the body."""
    smooth = np.stack([cv2.GaussianBlur(p, (0, 0), 2 / spacing[1]) for p in hu.astype(np.float32)])
    body = eroded(smooth > -300, spacing, 8)
    rows, columns = (np.flatnonzero(body.any(axis=axis)) for axis in ((0, 2), (0, 1)))
    back, wide = rows[0] + 0.72 * np.ptp(rows), columns[0] + np.ptp(columns) * np.array([0.2, 0.8])
    y, x = np.indices(hu.shape[1:])
    dorsal = (y > back) & (x > wide[0]) & (x < wide[1])
    fat = body & eroded((smooth > -140) & (smooth < -60), spacing, 3)
    return fat, body & dorsal & eroded((smooth > 20) & (smooth < 90), spacing, 4)


def noise(hu, liver, spacing):
    """Standard deviation (HU) within tiles of liver about their plane trend, and the frequency
    (cycles per mm) of most power.
    """
    side = int(TILE_MM / spacing[1]) // 2 * 2
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    trend = np.stack([np.ones(side**2), y.ravel(), x.ravel(), (y * x).ravel()], axis=1)
    spreads, power = [], []
    for plane, inside in zip(hu, liver, strict=True):
        for top in range(0, plane.shape[0] - side, side):
            for left in range(0, plane.shape[1] - side, side):
                tile = (slice(top, top + side), slice(left, left + side))
                if inside[tile].mean() < 1:
                    continue
                values = plane[tile].ravel().astype(float)
                rest = values - trend @ np.linalg.lstsq(trend, values, rcond=None)[0]
                spreads.append(rest.std())
                power.append(np.abs(np.fft.fft2(rest.reshape(side, side))) ** 2)
    if len(spreads) < 3:
        return np.nan, np.nan
    quiet = np.argsort(spreads)[: max(3, len(spreads) // 2)]  # those without vessels and lesions
    f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(side, spacing[1])] * 2))
    mean, step = np.mean([power[k] for k in quiet], axis=0), 1.0 / TILE_MM
    bins = np.arange(step / 2, 0.5 / spacing[1], step)
    radial = [mean[(f >= low) & (f < low + step)].mean() for low in bins]
    return float(np.mean([spreads[k] for k in quiet])), float(
        bins[int(np.argmax(radial))] + step / 2
    )


def edge(hu, spacing):
    """Median width (mm) over which columns in the middle rise from 10 to 90 percent of the way from
    air to skin, as the first steep rise from the front.
    """
    widths, middle = [], hu.shape[2] // 2
    for plane in hu[:: max(1, len(hu) // 12)]:
        for x in range(middle - 10, middle + 11, 2):
            profile = plane[:, x].astype(float)
            inside = np.flatnonzero(profile > -300)
            if not len(inside) or inside[0] < 4:
                continue
            part = profile[inside[0] - 4 : inside[0] + 3]
            low, high = part.min(), part.max()
            levels = [low + share * (high - low) for share in (0.1, 0.9)]
            rise = part[: part.argmax() + 1]
            at = [
                np.interp(level, np.maximum.accumulate(rise), np.arange(len(rise)))
                for level in levels
            ]
            widths.append((at[1] - at[0]) * spacing[1])
    return float(np.median(widths)) if widths else np.nan


def measured(hu, spacing, masks, numbers):
    """Cells of a row by name of the column, from at most `SLICES` slices."""
    some = np.unique(np.linspace(0, len(hu) - 1, SLICES).astype(int))
    hu, masks = np.ascontiguousarray(hu[some]), None if masks is None else masks[some]
    row = {}
    for name, values in numbers.items() if masks is not None else ():
        inside = eroded(np.isin(masks, values), spacing, 4)
        row[name] = hu[inside] if inside.sum() > 100 else None
    row["fat"], row["muscle"] = (hu[mask] for mask in bulk(hu, spacing))
    cells = {
        k: f"{v.mean():.0f} ± {v.std():.0f}" for k, v in row.items() if v is not None and len(v)
    }
    if masks is not None:
        liver = eroded(np.isin(masks, numbers["liver"]), spacing, 4)
        spread, peak = noise(hu, liver, spacing)
        cells |= {"noise": f"{spread:.1f}", "peak": f"{peak:.2f}"}
    return cells | {"edge": f"{edge(hu, spacing):.1f}"}


def print_row(name, hu, spacing, cells):
    size = f"{len(hu)} x {hu.shape[1]} px, {spacing[1]:.2f} x {spacing[0]:.1f} mm"
    print(f"| {name} | {size} |", " | ".join(cells.get(k, "") for k in COLUMNS), "|", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", nargs="*", default=[], metavar="SERIES=FILE")
    options = parser.parse_args()
    labels = dict(pair.split("=") for pair in options.labels)
    print(
        "| series | size | liver | spleen | kidneys | fat | muscle | noise | peak /mm | edge mm |"
    )
    print("|---" * (2 + len(COLUMNS)) + "|")
    for path in sorted(options.folder.iterdir()):
        name = path.name.split(".")[0]
        if path.is_dir() and any(path.glob("*.dcm")):
            hu, spacing = read_dicom(path)
        elif path.name.endswith(".nii.gz") and str(path) not in labels.values():
            hu, spacing = read_nifti(path)
        else:
            continue
        masks = read_nifti(labels[name])[0] if name in labels else None
        print_row(name, hu, spacing, measured(hu, spacing, masks, TOTAL))
    config = PhantomConfig(image_size=256, slices_min=40, slices_max=40)
    for k, hospital in enumerate(HOSPITALS):
        healthy = dict.fromkeys(TARGET_NAMES, 0)
        scan = make_scan(config, healthy, (0, 0, k), 0, "portal", hospital)
        cells = measured(scan.hu, scan.spacing, scan.masks, PHANTOM)
        print_row(f"phantom, hospital {hospital.name}", scan.hu, scan.spacing, cells)


if __name__ == "__main__":
    main()
