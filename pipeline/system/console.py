"""What a run says while it works: log lines, progress and timings."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from .machine import T


def log(message: str) -> None:
    """Print one time-stamped line to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def progress(
    items: Iterable[T], total: int, name: str, unit: str = "it", every_s: float = 15.0
) -> Iterator[T]:
    """Yield `items` with a bar (terminal) or a plain line every `every_s` seconds, both with rate
    and ETA.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=name, unit=unit)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= every_s:
            shown, rate = now, done / (now - start)
            log(
                f"{name}: {done}/{total} {unit}, {rate:.1f} {unit}/s, ETA"
                f" {(total - done) / rate:.0f} s"
            )


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Call `work` and return its result with the wall time in seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start
