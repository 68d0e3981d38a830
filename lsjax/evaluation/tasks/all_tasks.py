"""The tasks by name."""

from lsjax.evaluation.tasks.gsm8k import GSM8K
from lsjax.evaluation.tasks.human_eval import HUMAN_EVAL
from lsjax.evaluation.tasks.news import CNN_DM_LM, CNN_DM_SUMMARIZATION, XSUM_SUMMARIZATION
from lsjax.evaluation.tasks.pairs import PAIRS
from lsjax.evaluation.tasks.spec_bench import SPEC_BENCH
from lsjax.evaluation.tasks.task import Task
from lsjax.evaluation.tasks.topv2 import TOPV2

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(CNN_DM_SUMMARIZATION, XSUM_SUMMARIZATION, CNN_DM_LM, HUMAN_EVAL),
        *(TOPV2, GSM8K, SPEC_BENCH, PAIRS),
    )
}
