"""The longer 2D-VoCo run: position accuracy on held-out volumes, at least 0.9: `python
tests/benchmarks/voco_long.py`.

Makes the demo's phantom and volumes in `--out` (stages 00 to 02, skipped where they are up to
date), pretrains for `--steps` steps with the teacher's momentum rising to 0.99, and prints accuracy
and embedding spread over the steps. On a GPU where there is one. Stopped, it goes on when called
again. Exit code 1 where the accuracy stays below `--goal`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from pipeline.learning.log import read_log

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the stages, print one Markdown table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--out", type=Path, default=ROOT / "outputs" / "voco_long")
    flags.add_argument("--config", default="demo")
    flags.add_argument("--steps", type=int, default=2500)
    flags.add_argument("--goal", type=float, default=0.9)
    flags.add_argument("overrides", nargs="*", help="config overrides, e.g. pretrain.slices=8")
    options = flags.parse_intermixed_args()
    long = [f"pretrain.steps={options.steps}", "pretrain.ema_final=0.99", *options.overrides]
    for number in ("00", "01", "02", "04"):
        (stage,) = (ROOT / "stages").glob(f"{number}_*.py")
        subprocess.run(
            [
                sys.executable,
                str(stage),
                "--config",
                options.config,
                "--out",
                str(options.out),
                *long,
            ],
            check=True,
        )
    records = read_log(options.out / "04_voco2d" / "log.jsonl")
    seen = [record for record in records if "position_accuracy" in record]
    print("| step | position accuracy | embedding standard deviation |\n|---|---|---|")
    for record in seen[:: max(1, len(seen) // 12)] + seen[-1:]:
        print(f"| {record['step']} | {record['position_accuracy']:.3f} | {record['std']:.2f} |")
    best = max(record["position_accuracy"] for record in seen)
    waiting = sum(record["waiting"] for record in records) / len(records)
    print(f"\nbest {best:.3f}, share of time waiting for data {waiting:.1%}")
    return 0 if best >= options.goal else 1


if __name__ == "__main__":
    raise SystemExit(main())
