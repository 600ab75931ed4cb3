from __future__ import annotations

import pytest

from optimizer.errors import ConfigError
from optimizer.stages.session import check_device


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match="device is cpu, cuda"):
        check_device(name)


def test_the_cpu_is_always_here() -> None:
    check_device("cpu")
    check_device("cpu:0")
