"""Which side a document is on depends on its content only."""

import numpy as np

from lsjax.data.pieces import Document, is_held_out

DOCUMENTS = [Document(f"text {n}") for n in range(4000)]
KEYS_N = np.array([document.key for document in DOCUMENTS], np.uint64)


def test_the_share_is_what_was_asked_for_and_one_document_is_judged_as_many_are():
    for fraction in (0.0, 0.05, 0.5):
        held_N = is_held_out(KEYS_N, fraction)
        assert held_N.tolist() == [is_held_out(document.key, fraction) for document in DOCUMENTS]
        # four standard deviations of a binomial
        assert abs(held_N.mean() - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / 4000)


def test_a_larger_share_holds_the_smaller_one():
    assert (is_held_out(KEYS_N, 0.05) <= is_held_out(KEYS_N, 0.2)).all()


def test_all_responses_to_a_prompt_are_on_one_side():
    assert Document("yes", "really?").key == Document("no", "really?").key
    assert Document("yes", "really?").key != Document("yes", "honestly?").key
