"""What a calibration fitted to single fold models costs the mean of five, simulated: `python
tests/benchmarks/fold_mean.py`.

One binary target of sample weight 2 or 6. A model's logit is twice the sum of the truth's and an
error of its own. Calibration (temperature and bias) is fitted to one model, as to out-of-fold
predictions; the cost is the score of the calibrated mean above that of the best calibration of the
same mean.
"""

import math

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

PATIENTS, MODELS, TOO_SURE = 200_000, 5, 2.0


def costs(weight: int, error: float, rng: np.random.Generator) -> tuple[float, float]:
    """Of the mean of probabilities and of that of logits; `error` is the standard deviation."""
    truth = (-4.0 if weight == 2 else -3.0) + rng.normal(0, 1.6, PATIENTS)
    injured = rng.random(PATIENTS) < expit(truth)
    weights = np.where(injured, weight, 1)
    noise = error * rng.normal(size=(MODELS, PATIENTS))
    logits = TOO_SURE * (truth + math.log(weight) + noise)

    def loss(line: np.ndarray, x: np.ndarray) -> float:
        z = line[0] * x + line[1]
        return (weights * np.logaddexp(0, np.where(injured, -z, z))).sum() / weights.sum()

    def best(x: np.ndarray) -> np.ndarray:
        return minimize(loss, [1.0, 0.0], args=(x,)).x

    fitted = best(logits[0])
    means = logit(expit(logits).mean(0)), logits.mean(0)
    return tuple(loss(fitted, x) - loss(best(x), x) for x in means)


def main() -> None:
    """Print one Markdown table."""
    rng = np.random.default_rng(0)
    print("| fold models differ by | mean of | weight 2 | weight 6 |\n|---|---|---|---|")
    for error in (0.3, 0.6, 1.0):
        found = [costs(weight, error, rng) for weight in (2, 6)]
        for k, name in enumerate(("probabilities", "logits")):
            values = " | ".join(f"{pair[k]:.4f}" for pair in found)
            print(f"| {TOO_SURE * error:.1f} | {name} | {values} |")


if __name__ == "__main__":
    main()
