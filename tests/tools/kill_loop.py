"""Kill the smoke run again and again, at random moments and inside writes: every rerun must end
with the submission of an undisturbed run.

    python tests/tools/kill_loop.py --kills 40

A trial starts from an empty folder: run_all.sh is killed (SIGKILL to its whole process group), run
again, perhaps killed again, and at last left alone. Half of the kills come at a random moment, half
when a random stage writes a random byte of one of its files. In the end two undisturbed runs with
one seed must agree byte for byte, and one with another seed must not. Exit code 0 where all that
holds.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from helpers_faults import PATIENCE_S, copy, none_alive, run, start, temporaries  # noqa: E402

SUBMISSION, STAGES = (
    Path("08_submission", "submission.csv"),
    ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09"),
)
AGAIN = 0.5  # probability that a rerun is killed too
START_S = 1.0  # of each stage script, outside the seconds of its manifest


def folder_of(reference: Path, stage: str) -> Path:
    """Where a stage of a finished run wrote."""
    return reference / "data" / "phantom" if stage == "00" else next(reference.glob(f"{stage}_*"))


def aim(reference: Path, stages: tuple[str, ...], draw: random.Random) -> tuple[str, str]:
    """A random byte of a random file of a random stage, as the shim's fault and the stage."""
    stage = draw.choice(stages)
    sizes = [
        path.stat().st_size for path in folder_of(reference, stage).rglob("*") if path.is_file()
    ]
    return f"kill:{draw.randrange(max(1, draw.choice(sizes)))}", stage


def kill(
    out: Path, seconds: float, reference: Path, stages: tuple[str, ...], draw: random.Random
) -> str:
    """Start the run and kill it; returns where it was hit: `moment`, `write`, or `missed` where it
    was done before.
    """
    fault, stage = aim(reference, stages, draw) if draw.random() < 0.5 else ("", "")
    process = start("run_all", out, fault=fault, stage=stage)
    try:
        process.communicate(timeout=None if fault else draw.uniform(0.2, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    if not none_alive(process.pid):
        raise SystemExit("FAILED: a process outlived the kill of its group")
    return "missed" if process.returncode == 0 else "write" if fault else "moment"


def unfinished(
    out: Path, reference: Path, stages: tuple[str, ...]
) -> tuple[tuple[str, ...], float]:
    """The stages that a rerun has yet to do, and about how many seconds it takes, by the
    reference's manifests.
    """
    left, seconds = [], START_S * len(stages)
    for stage in stages:
        manifest = folder_of(reference, stage) / "manifest.json"
        if not (out / manifest.relative_to(reference)).exists():
            left.append(stage)
            seconds += json.loads(manifest.read_text())["seconds"]
    return tuple(left), seconds


def trial(
    out: Path, reference: Path, begin: str, kills: int, draw: random.Random
) -> tuple[Counter, list[str]]:
    """One folder killed up to `kills` times, then run to its end: where it was hit, and what is
    wrong.
    """
    names = [folder_of(reference, stage).name for stage in STAGES]
    kept = names.index(begin) if begin else 0
    copy(reference, out, *names[kept:], *([] if kept else ["data"])) if kept else out.mkdir()
    hits: Counter = Counter()
    while hits.total() - hits["missed"] < kills and (not hits or draw.random() < AGAIN):
        left, seconds = unfinished(out, reference, STAGES[kept:])
        if not left:
            break
        hits[kill(out, seconds, reference, left, draw)] += 1
    code, text = run("run_all", out)
    faults = [] if code == 0 else [f"the rerun ends with {code}: {text[-2000:]}"]
    if not faults and (out / SUBMISSION).read_bytes() != (reference / SUBMISSION).read_bytes():
        faults.append("another submission")
    faults += [f"left behind: {path}" for path in temporaries(out)]
    return hits, faults


def seeds(work: Path, reference: Path) -> list[str]:
    """What is wrong with runs of the same and of another seed."""
    faults = []
    for name, arguments in (("same", ()), ("other", ("seed=4",))):
        code, text = run("run_all", work / name, *arguments)
        if code:
            return [f"the run with the {name} seed ends with {code}: {text[-2000:]}"]
        equal = (work / name / SUBMISSION).read_bytes() == (reference / SUBMISSION).read_bytes()
        faults += (
            []
            if equal == (name == "same")
            else [f"the submissions of the {name} seed are {'equal' if equal else 'different'}"]
        )
    return faults


def main() -> int:
    """Command line; returns the exit code."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--kills", type=int, default=40)
    flags.add_argument("--seed", type=int, default=0, help="of the moments and bytes")
    flags.add_argument("--work", type=Path, help="where to run (default: a temporary folder)")
    flags.add_argument(
        "--reference",
        type=Path,
        help="a finished smoke run; without it one is made, and the seeds are compared",
    )
    flags.add_argument(
        "--begin",
        default="",
        help="first stage folder to run and kill; earlier ones are copied from the reference",
    )
    options = flags.parse_args()
    work, draw = Path(tempfile.mkdtemp(dir=options.work)), random.Random(options.seed)
    began, hits, faults, trials = time.monotonic(), Counter(), [], 0
    try:
        reference = options.reference or work / "reference"
        if not options.reference:
            code, text = run("run_all", reference)
            faults += [f"the undisturbed run ends with {code}: {text[-2000:]}"] if code else []
        while not faults and (left := options.kills - hits.total() + hits["missed"]) > 0:
            found, wrong = trial(work / "trial", reference, options.begin, left, draw)
            hits, trials, faults = (
                hits + found,
                trials + 1,
                [f"trial {trials + 1}: {fault}" for fault in wrong],
            )
            print(
                f"trial {trials}: {dict(found)} {'FAILED' if wrong else 'same submission'}",
                flush=True,
            )
            if not faults:
                shutil.rmtree(work / "trial")
        faults = faults or ([] if options.reference else seeds(work, reference))
    finally:
        shutil.rmtree(work, ignore_errors=True) if not faults else print(f"kept: {work}")
    found = (
        f"{hits.total() - hits['missed']} kills ({hits['moment']} at a moment, {hits['write']}"
        " inside a write)"
    )
    print(
        *faults,
        f"{'FAILED' if faults else 'passed'}: {found} in {trials} trials,"
        f" {time.monotonic() - began:.0f} s",
        sep="\n",
    )
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
