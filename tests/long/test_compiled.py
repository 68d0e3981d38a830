"""Every strategy's loop copies nothing large. Long: twelve programs are compiled."""

import numpy as np
import pytest

from lsjax.decoding.adaptive import Adaptive
from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from tests.decoding.test_compiled import assert_no_large_copies


# Capacities below and above LARGE.
@pytest.mark.parametrize("batch, capacity", [(1, 1613), (9, 613)])
@pytest.mark.parametrize(
    "strategy",
    [
        Autoregressive(),
        EarlyExit(2),
        SelfSpeculative(2, 3),
        SelfSpeculative(2, 3, shared_exits=(1, 3), shared_lengths=(0, 2)),
        SelfSpeculative(2, 3, DraftVocabulary(np.arange(50))),
        Adaptive((1, 2), lengths=(0, 2, 3)),
    ],
    ids=["autoregressive", "early_exit", "self_speculative", "shared", "draft_vocabulary", "auto"],
)
def test_no_copy_of_weights_or_cache_in_the_loop(model, strategy, batch, capacity):
    assert_no_large_copies(model, strategy, batch, capacity)
