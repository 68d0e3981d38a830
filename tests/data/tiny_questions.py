"""A TensorFlow data set of numbered questions, in a module of its own as TFDS wants it."""

import numpy as np
import tensorflow_datasets as tfds


class TinyQuestions(tfds.core.GeneratorBasedBuilder):
    """Questions 0 to 19 to train on; 15 to 29 to validate and to test; five are in both."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"question": text, "answer": text, "number": np.int32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(20)),
            "validation": self._generate_examples(range(15, 30)),
            "test": self._generate_examples(range(15, 30)),
        }

    def _generate_examples(self, numbers):
        for n in numbers:
            yield n, {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.", "number": n}


class ByHand(TinyQuestions):
    """The same, but made of files that somebody has to fetch."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get questions.zip\n  from the library."

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(len(list(dl_manager.manual_dir.iterdir()))))}
