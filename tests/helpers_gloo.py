"""One rank of a gloo world: run by test_pretrain in processes of its own, prints one JSON line."""

import json
import sys
from pathlib import Path

import torch

from pipeline.config import load_config
from pipeline.distributed import setup
from pipeline.pretrain import STATS, start, train_step
from pipeline.voco_data import VocoSamples


def main() -> None:
    """argv: folder of volumes, steps, overrides."""
    folder, steps, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    config, world = load_config("smoke", overrides), setup("cpu")
    run = start(config, world)
    paths = sorted(path.name for path in Path(folder).glob("*.npy"))
    samples = VocoSamples(Path(folder), paths, config.pretrain, config.seed, world.rank, world.size)
    records = [train_step(run, samples[step])[0] for step in range(int(steps))]
    losses = [[record[name] for name in STATS] for record in records]
    weights = [float(tensor.double().norm()) for tensor in run.teacher.state_dict().values()]
    if world.main:
        print(json.dumps({"losses": losses, "weights": weights}))
    world.close()


if __name__ == "__main__":
    main()
