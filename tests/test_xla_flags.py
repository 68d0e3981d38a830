"""Unknown flags of XLA are left out before XLA reads them and ends the process."""

import pytest

from scripts import xla_flags

KNOWN = "--xla_backend_optimization_level=0"


def test_an_unknown_flag_is_left_out():
    assert xla_flags.known_flags([KNOWN, "--xla_no_such_flag=1"]) == KNOWN


def test_another_error_of_jax_is_not_hidden(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    with pytest.raises(RuntimeError, match="jax does not start: .*no_such_platform"):
        xla_flags.known_flags([KNOWN])
