"""What tests of several packages share: one small local Ray for the whole run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

# Ray reads these when it is first imported, here and in its workers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Triton reads this one when it is first imported, which other packages do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray with four logical CPUs and Serve without its proxies, started once; `gateway.server.app.start` joins it."""
    import ray
    from ray import serve

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=128 << 20,
        namespace="patchbay",
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
    yield
    serve.shutdown()
    ray.shutdown()
