"""The tasks by name."""

from lsjax.evaluation.tasks.task import Task
from lsjax.evaluation.tasks.topv2 import TOPV2

TASKS: dict[str, Task] = {task.name: task for task in (TOPV2,)}
