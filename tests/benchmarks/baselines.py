"""How long the baselines of stage 07 take at the size of the competition's training set, with drawn
volumes and features: `python tests/benchmarks/baselines.py [--jobs 2]`.

Thumbnails are smooth noise, labels have prevalences near the competition's.
"""

import argparse

import numpy as np
from scipy.ndimage import gaussian_filter
from score import PATIENTS, SERIES, draw_labels

from pipeline.competition.targets import group_slices
from pipeline.evaluation import baselines
from pipeline.system.console import timed
from pipeline.system.machine import peak_mb

VOLUME, VOLUMES = (96, 256, 256), 20


def main() -> None:
    """Print seconds and the peak of memory."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--jobs", type=int, default=2)
    jobs = flags.parse_args().jobs
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 256, VOLUME, dtype=np.uint8)
    for kind, describe in baselines.KINDS.items():
        seconds = timed(lambda describe=describe: [describe(volume) for _ in range(VOLUMES)])[1]
        print(f"{kind}: {1000 * seconds / VOLUMES:.1f} ms a volume of {VOLUME}")
    owner = np.sort(np.r_[np.arange(PATIENTS), rng.choice(PATIENTS, SERIES - PATIENTS, False)])
    labels = draw_labels(rng)[owner]
    classes = np.stack([labels[:, where].argmax(axis=1) for where in group_slices().values()])
    shape = baselines.DEPTH, baselines.SIDE, baselines.SIDE
    features = {
        "histogram": rng.dirichlet(np.ones(baselines.GREYS), SERIES),
        "thumbnail": np.stack(
            [gaussian_filter(rng.normal(size=shape), 1.2).ravel() for _ in range(SERIES)]
        ),
    }
    for kind, values in features.items():
        given = {kind: values.astype(np.float32)}
        work = lambda given=given: baselines.out_of_fold(  # noqa: E731
            given, classes, owner, owner % 5, jobs
        )
        print(f"{kind}: {timed(work)[1]:.1f} s for {SERIES} series, peak {peak_mb()} MB")


if __name__ == "__main__":
    main()
