"""The paper's tasks and some more: rows of a data set as prompts, and what a text is scored by."""
