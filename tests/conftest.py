"""What tests of several packages share: one small local Ray and one PostgreSQL server for the whole run."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tests import postgresql as postgresql_server
from tests import s3 as s3_server

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

    from adapters_store.database import Database

# Ray reads these when it is first imported, here and in its workers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Triton reads this one when it is first imported, which other packages do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """With `--dist=loadfile`, files run side by side, but for those that need a Ray, of which a machine has one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "ray" if {"e2e", "server", "soak"} & set(file.split("/")) else file

    return OneRay(config, log)


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
        pytest.skip("no PostgreSQL server: install Debian's `postgresql`, or set PATCHBAY_TEST_POSTGRESQL to one's URL")
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


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """The environment variables of an S3 server with one empty bucket."""
    for package in ("moto", "s3fs"):
        pytest.importorskip(package, reason="the S3 driver and moto's server are not installed (extra `dev`)")
    with s3_server.serve() as environment:
        s3_server.make_bucket(environment)
        yield environment


@pytest.fixture
def s3_url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The fsspec URL of an empty prefix in the bucket, with the environment to reach it."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.BUCKET}/{uuid.uuid4().hex}"
