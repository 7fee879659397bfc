"""A small data set in the competition's layout: DICOM series and tables."""

from pathlib import Path

from helpers_dicom import write_series

from pipeline.competition.targets import COLUMNS, TARGETS


def labels_of(number: int) -> list[int]:
    """One-hot labels (13) of the patient with this number: every class occurs."""
    return [
        int(k == number % len(target.classes))
        for target in TARGETS
        for k in range(len(target.classes))
    ]


def write_tables(data: Path, pairs: list[tuple[str, str]], split: str = "train") -> None:
    """The tables of a split for pairs of patient and series, one series a patient."""
    meta = "".join(f"{patient},{series}\n" for patient, series in pairs)
    (data / f"{split}_series_meta.csv").write_text(f"patient_id,series_id\n{meta}")
    rows = [
        ",".join([patient, *map(str, labels_of(number))])
        for number, (patient, _) in enumerate(pairs)
    ]
    text = "\n".join([",".join(["patient_id", *COLUMNS]), *rows]) + "\n"
    (data / ("train.csv" if split == "train" else "sample_submission.csv")).write_text(text)


def make_data(data: Path, patients: int = 4, slices: int = 3, unlabelled: int = 0) -> Path:
    """Patients 101, 102, ... with series 901, 902, ..., and unlabelled ones 1, 2, ..."""
    pairs = [(str(101 + k), str(901 + k)) for k in range(patients)]
    for number, (patient, series) in enumerate(pairs):
        write_series(data / "train_images" / patient / series, slices, seed=number)
    for number in range(unlabelled):
        write_series(data / "unlabelled" / str(number + 1) / "7", slices, seed=100 + number)
    write_tables(data, pairs)
    return data
