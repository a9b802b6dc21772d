"""A tiny base with its own tokenizer, and training files for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from gateway.config import EngineConfig
from gateway.trainer.dataset import TokenizedExample, load_chat_dataset
from gateway.trainer.files import TrainingFiles
from gateway.trainer.training_base import TrainingBase, load_training_base
from tests.gateway.trainer.tiny import colour_lines, make_base_folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def engine_config(base_folder: Path) -> EngineConfig:
    return EngineConfig(base=str(base_folder), device="cpu")


@pytest.fixture(scope="session")
def base(engine_config: EngineConfig) -> TrainingBase:
    return load_training_base(engine_config)


@pytest.fixture
def examples(base: TrainingBase) -> Sequence[TokenizedExample]:
    return load_chat_dataset(io.BytesIO(colour_lines()), base.tokenizer, max_seq_len=128)


def prepared(database: Database) -> Database:
    """With its tables and two tenants."""
    database.upgrade()
    accounts = Accounts(database)
    accounts.create_tenant("acme")
    accounts.create_tenant("globex")
    return database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = prepared(Database(f"sqlite:///{tmp_path / 'patchbay.db'}"))
    yield made
    made.dispose()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path / 'blobs'}")


@pytest.fixture
def files(database: Database, blobs: BlobStore) -> TrainingFiles:
    return TrainingFiles(database, blobs)


@pytest.fixture
def upload(files: TrainingFiles) -> Callable[..., str]:
    """Uploads a training file and returns its id."""

    def create(content: bytes | None = None, tenant: str = "acme") -> str:
        body = colour_lines() if content is None else content
        return files.create(tenant, "colours.jsonl", "fine-tune", io.BytesIO(body), 1 << 20).id

    return create
