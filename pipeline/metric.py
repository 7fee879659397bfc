"""The competition's score in float64: weighted log loss per target and for `any_injury`, and their
plain mean.

`python -m pipeline.metric SOLUTION.csv SUBMISSION.csv [--json]` scores one submission against
`train.csv`-like labels.
"""

import argparse
import json
from pathlib import Path

from .competition import strict_table
from .competition.metric import align, format_table, score_arrays
from .competition.strict_table import KEY
from .competition.targets import ANY_INJURY, COLUMNS
from .system.console import command_line, say


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; exit code 2 with one line on wrong input."""
    flags = argparse.ArgumentParser(prog="python -m pipeline.metric", description=__doc__)
    flags.add_argument("solution", type=Path, help="labels: patient_id and the 13 one-hot columns")
    flags.add_argument("submission", type=Path, help="predictions: patient_id and the 13 columns")
    flags.add_argument("--json", action="store_true", help="print JSON")
    options = flags.parse_args(arguments)
    columns = [KEY, *COLUMNS]
    solution = strict_table.load_table(options.solution, columns, [ANY_INJURY])
    result = score_arrays(*align(solution, strict_table.load_table(options.submission, columns)))
    say(json.dumps(result) if options.json else format_table({options.submission.stem: result}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
