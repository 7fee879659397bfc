"""The GPU paths proved right and measured, on any machine with a CUDA device:

    PYTHONPATH=. python tests/benchmarks/gpu.py [--quick] [--out FOLDER] [section ...]

Within 8 minutes on a modern card, within 3 with `--quick`. `gpu.json` and `gpu.md` (one table) are
written into FOLDER after every section, so a run that is cut keeps what it had. Exit code 1 where a
check fails, is cut short, or was asked for by name and left out. It draws its own data, needs no
network and nothing beyond requirements.txt; rows against MONAI need the extra `bench`. Sections:
see `SECTIONS`; named ones are run whatever `--quick` leaves out.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA: else not deterministic

import argparse
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu_checks as checks
import gpu_ranks
import gpu_rates as rates
import timm
import torch
from gpu_plan import Overtime, Plan, Row, at_most, missing

from pipeline import __version__
from pipeline.system.errors import InputError
from pipeline.system.files import write_json, write_text
from pipeline.system.machine import cpu_count, pick_device

LIMIT_S = {"tiny": 600.0, "quick": 170.0, "whole": 470.0}
PATIENCE = 3  # times its expected seconds a section may take


@dataclass(frozen=True)
class Section:
    """A part of the table; seconds that it takes on a modern card, quick and whole, and whether
    quick leaves it out unless it is named.
    """

    name: str
    work: Callable[[Plan], Iterator[Row]]
    quick_s: float
    whole_s: float
    long: bool = False

    def seconds(self, size: str) -> float:
        """What to expect of a run of this size."""
        return {"tiny": 0.0, "quick": self.quick_s, "whole": self.whole_s}[size]

    @property
    def proves(self) -> bool:
        """True where its rows are checks, which count as failed when they are cut short."""
        return self.work.__module__ in (checks.__name__, gpu_ranks.__name__)


# checks first: where time runs out, figures are left out
SECTIONS = (
    Section("limits", rates.limits, 4, 6),
    Section("pretraining", checks.pretraining, 20, 45),
    Section("resuming", checks.resuming, 15, 20),
    Section("fold", checks.fold, 10, 15),
    Section("compile", checks.compiled, 20, 60),
    Section("files", checks.files, 4, 4),
    Section("synchronisations", checks.synchronisations, 4, 4),
    Section("ranks", gpu_ranks.ranks, 40, 40, long=True),
    Section("graphs", checks.graphs, 40, 60, long=True),
    Section("steps", rates.steps, 22, 45),
    Section("waiting", rates.waiting, 13, 20),
    Section("folds", rates.folds, 15, 25),
    Section("prediction", rates.prediction, 10, 15),
    Section("checkpoints", rates.checkpoints, 5, 8),
    Section("batches", rates.batches, 10, 25),
    Section("memory order", rates.memory_order, 4, 6),
    Section("3D", rates.three_d, 12, 30),
    Section("compilation", rates.compilation, 40, 40, long=True),
)
UNREACHED = "the run was cut before"


def machine(device: torch.device) -> dict[str, str]:
    """What the figures belong to."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "card": "none (CPU)",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "Python": platform.python_version(),
        "VoCo2D": __version__,
        "CPU cores": str(cpu_count()),
    }
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        found |= {
            "card": f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB",
            "driver": driver(),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return found


def driver() -> str:
    """The driver's version, by the tool that comes with it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    call = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def rows_of(section: Section, plan: Plan, left: float, named: bool) -> Iterator[Row]:
    """The rows of a section, and one more where it is left out, fails, or takes too long."""
    expected = section.seconds(plan.size)
    lost = False if section.proves else None  # a check that was begun and did not end has failed
    if section.long and plan.size == "quick" and not named:
        yield missing(section.name, "not part of --quick unless it is named")
        return
    if expected > left:
        why = f"it would pass the {LIMIT_S[plan.size]:.0f} s"
        yield missing(section.name, why, False if named else None)
        return
    limit = min(left, PATIENCE * expected) if expected else left
    plan.until = time.monotonic() + (expected or limit)
    try:
        with at_most(limit):
            yield from section.work(plan)
    except Overtime:
        yield missing("the rest", f"it took more than {limit:.0f} s", lost)
    except torch.cuda.OutOfMemoryError:
        yield missing("the rest", "out of memory", lost)
    except Exception as fault:  # of whatever kind: the other sections count, the exit code tells
        traceback.print_exc()
        text = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
        yield missing("the rest", text, False)


def write(out: Path, about: dict[str, str], report: dict[str, list[Row]]) -> None:
    """Both files, whole at every moment; JSON knows no NaN, which stands there as text."""
    table = {
        name: [asdict(row) | {"value": in_json(row.value)} for row in rows]
        for name, rows in report.items()
    }
    write_json(out / "gpu.json", {"machine": about, "sections": table})
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += ["| section | row | value | tolerance | result | note |", "|---|---|---|---|---|---|"]
    lines += [
        "| " + " | ".join([name, *(text.replace("|", "/") for text in cells(row))]) + " |"
        for name, rows in report.items()
        for row in rows
    ]
    write_text(out / "gpu.md", "\n".join([*lines, ""]))


def in_json(value: float | None) -> float | str | None:
    """A figure as JSON can hold it."""
    return value if value is None or math.isfinite(value) else str(value)


def cells(row: Row) -> list[str]:
    """A row of the Markdown table, after its section."""
    if row.value is None:
        value, note = "not measured", row.note.removeprefix("not measured: ")
    else:
        value, note = f"{row.value:.4g} {row.unit}".strip(), row.note
    result = {None: "", True: "passed", False: "FAILED"}[row.passed]
    return [row.name, value, row.tolerance, result, note]


def say(seconds: float, section: Section, row: Row) -> None:
    """A line of progress."""
    print(f"{seconds:5.0f} s  {section.name}: {'  '.join(filter(None, cells(row)))}", flush=True)


def main() -> int:
    """Run the sections in turn."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--quick", action="store_true", help="fewer steps and repeats, 3 minutes")
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    flags.add_argument("--out", type=Path, default=Path(), help="folder of gpu.json and gpu.md")
    flags.add_argument("--tiny", action="store_true", help="sizes of a test: no figure means much")
    names = [section.name for section in SECTIONS]
    flags.add_argument("sections", nargs="*", metavar="section", help=", ".join(names))
    options = flags.parse_intermixed_args()
    if unknown := set(options.sections) - set(names):
        flags.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    size = "tiny" if options.tiny else "quick" if options.quick else "whole"
    chosen = [one for one in SECTIONS if one.name in (options.sections or names)]
    if options.device == "cuda" and not torch.cuda.is_available():
        flags.error("no CUDA device is visible; give --device cpu for a rehearsal")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        flags.error(f"--out {options.out}: {fault.strerror}")
    try:
        return run(chosen, pick_device(options.device), size, options.out, options.sections)
    except InputError as fault:  # nothing can be written
        print(f"error: {fault}", file=sys.stderr)
        return 2


def run(
    chosen: Sequence[Section],
    device: torch.device,
    size: str,
    out: Path,
    named: Sequence[str] = (),
) -> int:
    """Run `chosen`, those `named` in any case, and write what they find; returns the exit code."""
    begun, about = time.monotonic(), {"run": size, **machine(device)}
    report = {section.name: [missing(section.name, UNREACHED)] for section in chosen}
    write(out, about, report)
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(device, size, Path(folder))
        for section in chosen:
            left = LIMIT_S[size] - (time.monotonic() - begun)
            found: list[Row] = []
            try:
                for row in rows_of(section, plan, left, section.name in named):
                    found.append(row)
                    say(time.monotonic() - begun, section, row)
            except (KeyboardInterrupt, Overtime) as cut:  # Overtime: it rang between two rows
                found.append(missing("the rest", UNREACHED, False if section.proves else None))
                code = 130 if isinstance(cut, KeyboardInterrupt) else 0
            report[section.name] = found
            write(out, about, report)
            if code:
                break
    failed = told(report)
    return code or failed


def told(report: dict[str, list[Row]]) -> int:
    """Print what failed, how much passed and what was not measured; returns the exit code."""
    rows = [(name, row) for name, found in report.items() for row in found]
    failed = [f"FAILED {name}: {row.name}" for name, row in rows if row.passed is False]
    passed = sum(row.passed is True for _, row in rows)
    absent = sum(row.value is None for _, row in rows)
    print("\n".join([*failed, f"{passed} checks passed, {absent} rows not measured"]))
    return 1 if failed else 0


if __name__ == "__main__":
    for text in ("deterministic", "TF32"):  # what torch says to the settings of checks
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    sys.exit(main())
