"""What tests of several packages share: one small local Ray and one PostgreSQL server for the whole run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tests import postgresql as postgresql_server

if TYPE_CHECKING:
    from adapters_store.database import Database

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


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The SQLAlchemy URL of an empty PostgreSQL database: PATCHBAY_TEST_POSTGRESQL, or a server started here."""
    if url := os.environ.get("PATCHBAY_TEST_POSTGRESQL"):
        yield url
        return
    if postgresql_server.find_binary("initdb") is None:
        pytest.skip("no PostgreSQL server is installed")
    with postgresql_server.serve() as url:
        yield url


@pytest.fixture
def postgresql(postgresql_url: str) -> Iterator[Database]:
    """An empty PostgreSQL database without tables."""
    from sqlalchemy import text

    from adapters_store.database import Database
    from adapters_store.tables import metadata

    database = Database(postgresql_url)
    yield database
    with database.write() as connection:
        metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
    database.dispose()
