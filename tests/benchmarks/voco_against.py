"""A 2D-VoCo step of this checkout against that of another one, such as an older commit's:

    git worktree add ../before COMMIT
    python tests/benchmarks/voco_against.py ../before

Each in a process of its own, a step at a time in turn, from the same seed on the same random crops,
in the precision that the pipeline takes on this CPU. Prints the losses of both side by side and how
the times compare; exit code 1 where a step takes more than `--most` times the other's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[2]


def serve(overrides: Sequence[str]) -> None:
    """Take a step for each line of the input, a seed; print its seconds and loss."""
    import torch  # here: the process that compares needs none of it
    from voco_step import batch_of, by_precision, make

    cpu = torch.device("cpu")
    config = list(by_precision(cpu, overrides).values())[-1]
    step = make("ours", config, cpu)
    for seed in sys.stdin:
        torch.manual_seed(int(seed))
        batch, begun = batch_of(config), time.perf_counter()
        taken = step(batch)
        figures, _ = taken if isinstance(taken, tuple) else taken.read()  # once a step waited
        loss = figures["loss"]
        print(json.dumps([time.perf_counter() - begun, loss]), flush=True)


def start(root: Path, overrides: Sequence[str]) -> subprocess.Popen:
    """`serve` with the code of `root`; SystemExit where there is none."""
    if not (root / "pipeline" / "__init__.py").is_file():
        raise SystemExit(f"{root}: no checkout of this project, it has no pipeline/__init__.py")
    call = [sys.executable, __file__, str(root), *overrides, "--serve"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(call, env=environment, text=True, **pipes)


def ask(process: subprocess.Popen, seed: int) -> tuple[float, float]:
    """Seconds and loss of the next step."""
    print(seed, file=process.stdin, flush=True)
    if not (line := process.stdout.readline()):
        raise SystemExit(f"{process.args[2]}: its code took no step here, see above")
    return tuple(json.loads(line))


def compare(other: Path, steps: int, most: float, overrides: Sequence[str]) -> int:
    """Run both and print two Markdown tables; returns the exit code."""
    processes = [start(root, overrides) for root in (HERE, other)]
    found = [[ask(process, seed) for process in processes] for seed in range(steps)]
    print("| step | loss here | loss there |\n|---|---|---|")
    for k, ((_, here), (_, there)) in enumerate(found):
        print(f"| {k} | {here:.6f} | {there:.6f} |")
    times = [(here, there) for (here, _), (there, _) in found[1:]]  # the first one warms up
    here_s, there_s, ratio = (
        median(column) for column in (*zip(*times, strict=True), [a / b for a, b in times])
    )
    print("\n| here, s | there, s | median of the ratios |\n|---|---|---|")
    print(f"| {here_s:.3f} | {there_s:.3f} | {ratio:.3f} |")
    return int(ratio > most)


if __name__ == "__main__":
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("folder", type=Path, help="the other checkout")
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--most", type=float, default=1.05, help="times as long as the other's")
    flags.add_argument("--serve", action="store_true", help="internal: take steps as asked")
    flags.add_argument("overrides", nargs="*", help="config overrides")
    given = flags.parse_intermixed_args()
    if given.serve:
        serve(given.overrides)
    else:
        sys.exit(compare(given.folder.resolve(), given.steps, given.most, given.overrides))
