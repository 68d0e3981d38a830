"""Wall time of a run by use, over all its starts.

Rows of kind "time" in metrics.jsonl hold the seconds of each use up to then. The rows of steps that
follow the last one continue it, so a run that was killed knows its time up to its last row.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

TIME = "time"  # kind of the rows
# "steps_done_again": those of a killed process after its last checkpoint. "checkpoints": the time
# for which they block. "restarts": from the last row of a process until the next one has its state.
USES = (
    *("steps", "steps_done_again", "compiling", "waiting_for_data", "evaluation", "checkpoints"),
    *("start", "restarts"),
)


class Clock:
    """Counts each moment of the run exactly once. rows: all rows of earlier processes. from_step:
    step after which the run resumes. began: Unix time at which this process began."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], from_step: int, began: float):
        self._began = next((row["began"] for row in rows if row["kind"] == TIME), began)
        self._seconds = so_far(rows)
        use = "restarts" if self._seconds else "start"
        kept = so_far([row for row in rows if row["step"] <= from_step])["steps"]
        self._seconds["steps_done_again"] += self._seconds["steps"] - kept
        self._seconds["steps"] = kept
        self.spend(use)
        self._last = self._seconds.total()

    def spend(self, use: str, until: float | None = None) -> None:
        """Counts the time that is not counted yet for a use. until: Unix time; now by default."""
        counted = self._began + self._seconds.total()
        self._seconds[use] += max(0.0, (until or time.time()) - counted)

    def lap(self) -> float:
        """Counted seconds since the last call."""
        before, self._last = self._last, self._seconds.total()
        return self._last - before

    def row(self) -> dict[str, float]:
        """The seconds of each use and their sum; began: Unix time of the start of the run."""
        uses = {use: self._seconds[use] for use in USES}
        return {"began": self._began, "wall": self._seconds.total(), **uses}

    def __str__(self):
        wall = self._seconds.total()
        shares = (f"{use.replace('_', ' ')} {self._seconds[use] / wall:.1%}" for use in USES)
        return f"wall time {timedelta(seconds=round(wall))}: {', '.join(shares)}"


def so_far(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Seconds of each use up to the last row; empty for rows without times."""
    seconds: Counter[str] = Counter()
    for row in rows:
        if row["kind"] == TIME:
            seconds = Counter({use: row[use] for use in USES})
        elif row["kind"] == "step" and seconds:
            seconds["steps"] += row["seconds"]
    return seconds
