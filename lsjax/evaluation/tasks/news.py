"""CNN/DailyMail (Hermann et al., 2015; See et al., 2017) and XSum (Narayan et al., 2018): news
articles to summarise, or to go on with. Templates and lengths are those of the paper's benchmark.
"""

from lsjax.config import check
from lsjax.evaluation.rouge import rouge
from lsjax.evaluation.tasks.task import Example, Row, Task

BEGINNING = 100  # words that an article to go on with begins with


def score(text: str, example: Example) -> dict[str, float]:
    """ROUGE against the reference."""
    return rouge(text, example.reference)


def beginning_and_rest(row: Row) -> Row:
    """The row with its article parted behind the first words, which stand a space apart."""
    article = row.get("article")
    check(isinstance(article, str | bytes), "has no text under 'article': name files that have one")
    article = article.decode(errors="replace") if isinstance(article, bytes) else article
    words = article.split()
    return {
        **row,
        "beginning": " ".join(words[:BEGINNING]),
        "rest": " ".join(words[BEGINNING:]),
    }


def one_line(text: str) -> str:
    """A shot's summary: CNN/DM's have a sentence a line, and a line's end is to end a shot."""
    return " ".join(text.splitlines())


CNN_DM_SUMMARIZATION = Task(
    name="cnn_dm_summarization",
    prompt_template="Article: {article}\nSummary:",
    response_template=" {highlights}",
    score=score,
    max_new_tokens=512,
    num_shots=1,
    shot_response=one_line,
    after_shots="\n",
    tfds=("cnn_dailymail", "test", "train"),
)

CNN_DM_LM = Task(
    name="cnn_dm_lm",
    prompt_template="{beginning}",
    response_template=" {rest}",
    score=score,
    max_new_tokens=512,
    tfds=("cnn_dailymail", "test", "train"),
    fields=beginning_and_rest,
)

XSUM_SUMMARIZATION = Task(
    name="xsum_summarization",
    prompt_template="Article: {document}\nSummary:",
    response_template=" {summary}",
    score=score,
    max_new_tokens=512,
    shot_response=one_line,
    after_shots="\n",
    tfds=("xsum", "test", "train"),
)
