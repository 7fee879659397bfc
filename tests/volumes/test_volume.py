"""Volumes: area resampling against an obvious reference, body outline, letterbox, and series-wise
rebuilding.
"""

import cv2
import numpy as np
import polars as pl
import pytest

from pipeline.run.config import VolumeConfig
from pipeline.run.layout import INDEX
from pipeline.run.manifest import digest
from pipeline.volumes import store as volume_store
from pipeline.volumes.build import build_volume, common_size, letterbox, plane_weights
from pipeline.volumes.store import build_all, usable

SMALL = VolumeConfig(depth=8, height=64, width=64, aspect="letterbox")


def body_slice(size=256, table=True, arm=True):
    """An ellipse of soft tissue, an arm beside it (2 mm of air between) and a table top below."""
    image = np.zeros((size, size), np.uint8)
    cv2.ellipse(image, (128, 120), (80, 55), 0, 0, 360, 120, -1)
    if arm:
        cv2.circle(image, (230, 130), 19, 120, -1)
    if table:
        cv2.line(image, (20, 190), (236, 190), 200, 3)
    return image


def naive_plane_weights(z, depth, samples=20_000):
    """Share of each slice in each plane by brute force: many points, each belonging to its nearest
    slice's interval.
    """
    place = np.abs(np.asarray(z, float) - z[0])
    middle = (place[1:] + place[:-1]) / 2
    edges = np.concatenate([[2 * place[0] - middle[0]], middle, [2 * place[-1] - middle[-1]]])
    points = edges[0] + (np.arange(samples * depth) + 0.5) / (samples * depth) * (
        edges[-1] - edges[0]
    )
    owner = np.searchsorted(edges, points, side="right") - 1
    return np.stack(
        [np.bincount(part, minlength=len(z)) / samples for part in owner.reshape(depth, samples)], 1
    )


@pytest.mark.parametrize(
    ("z", "depth"), [([0, -2, -4, -6, -8], 3), ([10, 7, 6, 1], 9), ([0, 1, 5], 2)]
)
def test_plane_weights_equal_brute_force(z, depth):
    weights = plane_weights(np.array(z, float), depth)
    assert weights.sum(0) == pytest.approx(1)
    assert weights == pytest.approx(naive_plane_weights(z, depth), abs=2e-3)


@pytest.mark.parametrize("z", [[np.nan] * 4, [0, 3, 1, 2], [5, 5, 5, 5]])
def test_slices_without_usable_positions_are_equidistant(z):
    assert plane_weights(np.array(z, float), 4) == pytest.approx(np.eye(4))


def test_box_leaves_table_and_arm_out():
    images = [body_slice() for _ in range(6)]
    volume = build_volume(
        iter(images), [i.shape for i in images], np.arange(0, -18, -3.0), (1.5, 1.5), SMALL
    )
    y0, y1, x0, x1 = volume.box
    assert abs(y0 - 65) <= 5
    assert abs(y1 - 176) <= 5
    assert abs(x0 - 48) <= 5
    assert abs(x1 - 209) <= 5
    assert not (volume.array > 150).any(), "no table in the volume"


def test_arm_that_stays_in_the_box_is_black():
    alone = body_slice(arm=False, table=False)
    # inside the body's bounding box, outside the body
    with_arm = cv2.circle(alone.copy(), (190, 60), 14, 120, -1)
    one, other = (
        build_volume([image] * 3, [image.shape] * 3, np.arange(3.0), (1.5, 1.5), SMALL)
        for image in (alone, with_arm)
    )
    assert one.box == other.box
    assert np.array_equal(one.array, other.array)


def test_means_are_rounded_and_not_cut():
    images = [np.full((32, 32), value, np.uint8) for value in (100, 101, 101) * 2]
    volume = build_volume(
        images, [(32, 32)] * 6, np.arange(6.0), (1, 1), VolumeConfig(depth=2, height=32, width=32)
    )
    assert (volume.array[:, 10:22, 10:22] == 101).all()


def test_letterbox_keeps_aspect_and_stretch_does_not():
    images = [body_slice(arm=False, table=False)] * 4
    kept = build_volume(images, [i.shape for i in images], np.arange(4.0), (1.0, 1.0), SMALL)
    assert kept.spacing_mm[1] == pytest.approx(kept.spacing_mm[2], rel=0.03)
    assert (kept.array[:, 0] == 0).all()
    stretched = build_volume(
        images,
        [i.shape for i in images],
        np.arange(4.0),
        (1.0, 1.0),
        SMALL.model_copy(update={"aspect": "stretch"}),
    )
    assert stretched.spacing_mm[2] > 1.3 * stretched.spacing_mm[1]


def test_mixed_sizes_are_letterboxed_to_the_common_one():
    assert common_size([(512, 512), (512, 512), (768, 768)]) == (512, 512)
    boxed = letterbox(np.full((20, 40), 9, np.uint8), 40, 40)
    assert boxed.shape == (40, 40)
    assert (boxed[10:30] == 9).all()
    assert not boxed[:9].any()
    # the same pixels on a wider field: smaller once it fits
    wide = np.pad(body_slice(), ((0, 0), (128, 128)))
    assert np.array_equal(
        letterbox(wide, 256, 256)[64:192],
        cv2.resize(wide, (256, 128), interpolation=cv2.INTER_AREA),
    )
    images = [np.full(size, 120, np.uint8) for size in ((64, 64), (64, 128), (64, 64))]
    array = build_volume(
        images,
        [i.shape for i in images],
        np.arange(3.0),
        (1, 1),
        VolumeConfig(depth=3, height=64, width=64),
    ).array
    assert (array[[0, 2], 4:60, 20:44] == 120).all()
    assert (array[1, 20:44, 20:44] == 120).all()
    assert not array[1, 4:12].any()
    images = [
        body_slice(),
        cv2.resize(body_slice(), (128, 128), interpolation=cv2.INTER_AREA),
        body_slice(),
    ]
    volume = build_volume(images, [i.shape for i in images], np.arange(3.0), (1.5, 1.5), SMALL)
    assert np.abs(volume.array[0].astype(int) - volume.array[4]).mean() < 3


def test_planes_name_their_nearest_slice_and_keep_order():
    images = [np.full((32, 32), 40 + 20 * i, np.uint8) for i in range(4)]
    volume = build_volume(
        images, [(32, 32)] * 4, -np.arange(4.0), (1, 1), VolumeConfig(depth=4, height=16, width=16)
    )
    assert volume.plane_sources == (0, 1, 2, 3)
    assert volume.array[:, 8, 8].tolist() == [40, 60, 80, 100]


@pytest.fixture
def slices(tmp_path):
    """A slice store of two series of five slices, one of them flagged partial."""
    rows = []
    for series in ("7", "8"):
        folder = tmp_path / "slices" / "1" / series
        folder.mkdir(parents=True)
        for order in range(5):
            cv2.imwrite(str(folder / f"{order + 3}.png"), body_slice())
            rows.append(
                {
                    "patient_id": "1",
                    "series_id": series,
                    "source": "train",
                    "instance_number": order + 3,
                    "order": order,
                    "z_mm": -3.0 * order,
                    "rows": 256,
                    "cols": 256,
                    "spacing_y_mm": 1.5,
                    "spacing_x_mm": 1.5,
                    "flags": "partial" if (series, order) == ("8", 2) else "",
                    "png": f"1/{series}/{order + 3}.png",
                    "crc32": 0,
                }
            )
    pl.DataFrame(rows).write_parquet(tmp_path / "slices" / INDEX)
    return tmp_path / "slices"


def test_store_builds_reuses_and_forgets_series(slices, tmp_path):
    target = tmp_path / "volumes"
    counts, digests = build_all(slices, target, SMALL, 1)
    assert counts["volumes"] == 2
    assert digests == {name: digest(target / name) for name in ("1_7.npy", "1_8.npy")}
    assert counts["slices_left_out"] == 1
    index = pl.read_parquet(target / INDEX)
    assert index["slices_used"].to_list() == [5, 4]
    assert index["plane_instances"][1].to_list() == [3, 3, 4, 4, 6, 6, 7, 7]
    assert np.load(target / "1_7.npy", mmap_mode="r").shape == (8, 64, 64)
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("*.npy")}
    table = pl.read_parquet(slices / INDEX)
    table = table.with_columns(
        z_mm=pl.when(pl.col("series_id") == "8").then(pl.col("z_mm") * 2).otherwise("z_mm")
    )
    table.write_parquet(slices / INDEX)
    build_all(slices, target, SMALL, 1)
    after = {path.name: path.stat().st_mtime_ns for path in target.glob("*.npy")}
    assert after["1_7.npy"] == before["1_7.npy"], "an unchanged series is not built again"
    assert after["1_8.npy"] != before["1_8.npy"], "a changed series is"
    table = table.with_columns(crc32=pl.when(pl.col("series_id") == "7").then(1).otherwise("crc32"))
    table.write_parquet(slices / INDEX)
    build_all(slices, target, SMALL, 1)
    assert (target / "1_7.npy").stat().st_mtime_ns != before["1_7.npy"], (
        "other pixels under the same header are a change too"
    )
    whole = (target / "1_8.npy").read_bytes()
    (target / "1_8.npy").write_bytes(whole[:-100])
    build_all(slices, target, SMALL, 1)
    assert (target / "1_8.npy").read_bytes() == whole, "a cut volume is built again"
    table.filter(pl.col("series_id") == "8").write_parquet(slices / INDEX)
    build_all(slices, target, SMALL, 1)
    assert sorted(path.name for path in target.glob("*.npy")) == ["1_8.npy"]


def test_a_damaged_sidecar_or_another_algorithm_builds_the_volume_again(
    slices, tmp_path, monkeypatch
):
    target = tmp_path / "volumes"
    build_all(slices, target, SMALL, 1)
    whole, sidecar = (target / "1_7.npy").read_bytes(), (target / "1_7.json").read_text()
    for damage in ("", sidecar[:40], "[]", "{}"):
        (target / "1_7.json").write_text(damage)
        build_all(slices, target, SMALL, 1)
        assert ((target / "1_7.npy").read_bytes(), (target / "1_7.json").read_text()) == (
            whole,
            sidecar,
        )
    before = (target / "1_7.npy").stat().st_mtime_ns
    monkeypatch.setattr(volume_store, "VOLUME_VERSION", -1)
    build_all(slices, target, SMALL, 1)
    assert (target / "1_7.npy").stat().st_mtime_ns != before


def test_damaged_spacings_do_not_rule_the_series(slices, tmp_path):
    """The first slice of all, the first of its size, and one in the middle; in the other series
    there is nothing else.
    """
    table, nothing = pl.read_parquet(slices / INDEX), [None, float("nan"), 703125.0, -0.7, 1e-9]
    build_all(slices, tmp_path / "good", SMALL, 1)
    y_mm, x_mm = [703125.0, 1.5, -0.7, 1.5, 1.5, *nothing], [1.5, 1e-9, 1.5, None, 1.5, *nothing]
    table.with_columns(spacing_y_mm=pl.Series(y_mm), spacing_x_mm=pl.Series(x_mm)).write_parquet(
        slices / INDEX
    )
    build_all(slices, tmp_path / "bad", SMALL, 1)
    good, index = (pl.read_parquet(tmp_path / name / INDEX) for name in ("good", "bad"))
    assert index.row(0) == good.row(0)
    assert index["spacing_x_mm"][1] == pytest.approx(
        index["box_x1"][1] / 64 - index["box_x0"][1] / 64, abs=0.1
    )


def test_slices_of_another_size_are_counted(slices, tmp_path):
    table = pl.read_parquet(slices / INDEX)
    odd = (pl.col("series_id") == "7") & pl.col("order").is_in([1, 4])
    for png in table.filter(odd)["png"]:
        cv2.imwrite(str(slices / png), body_slice()[:192])
    table.with_columns(rows=pl.when(odd).then(192).otherwise("rows")).write_parquet(slices / INDEX)
    build_all(slices, tmp_path / "volumes", SMALL, 1)
    assert pl.read_parquet(tmp_path / "volumes" / INDEX)["slices_resized"].to_list() == [2, 0]


def test_usable_slices_are_ordered_and_unflagged():
    table = pl.DataFrame({"order": [2, 0, 1, 3], "flags": ["", "", "partial", "partial,duplicate"]})
    assert usable(table)["order"].to_list() == [0, 2]
