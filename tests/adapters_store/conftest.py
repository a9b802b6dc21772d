"""A tiny Llama, adapters that peft itself saved for it, and a fresh store."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.base_spec import LINEARS, BaseSpec, module_path
from adapters_store.blobs import BlobStore
from adapters_store.canonical import CANONICAL_FILE
from adapters_store.database import Database
from adapters_store.errors import AdapterInvalid
from adapters_store.manifest import AdapterManifest
from adapters_store.registry import AdapterRegistry
from adapters_store.upload import StagedAdapter, Staging
from adapters_store.validator import validate

from .residency_world import SlowSlots, World

FINGERPRINT = "f" * 64


def tiny_model(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def save_adapter(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> Path:
    """What `peft` writes for a LoRA on the tiny model, with B not zero."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base() -> BaseSpec:
    modules = dict(tiny_model().named_modules())
    linears = {linear: modules[module_path(0, linear)] for linear in LINEARS}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    return BaseSpec(FINGERPRINT, 2, shapes, vocab_size=64)


@pytest.fixture(scope="session")
def saved_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture
def adapter(saved_adapter: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter that a test may spoil."""
    return Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with Staging(tmp_path / "staging") as staging:
        yield staging


def stage_folder(staging: Staging, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        staging.add_file(path.name, [path.read_bytes()])


def save_kind(folder: Path, config: PeftConfig, *, tied: bool = False) -> Path:
    """A random adapter of any kind, as peft saves it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_model(tied=tied), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def stage(staging: Staging, folder: Path, base: BaseSpec, **options: Any) -> StagedAdapter:
    stage_folder(staging, folder)
    return staging.validate(base, **{"max_rank": 16, **options})


def stage_here(folder: Path, base: BaseSpec, **options: Any) -> StagedAdapter:
    """`stage` in this process and that folder: a confined one takes a third of a second to start."""
    request = {
        "base": asdict(base),
        "weights_file": "adapter_model.safetensors",
        "max_rank": 16,
        "max_virtual_tokens": 0,
        "max_token_rows": 0,
        "max_import_error": 0.0,
        "base_fingerprint": None,
        **options,
    }
    return StagedAdapter(AdapterManifest.model_validate(validate(folder, request)), folder / CANONICAL_FILE)


def refused_here(folder: Path, base: BaseSpec, **options: Any) -> AdapterInvalid:
    """What `stage_here` raises."""
    with pytest.raises(AdapterInvalid) as caught:
        stage_here(folder, base, **options)
    return caught.value


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a new file from here on gets the system's own full device."""
    system = Path.open

    def open_full(path: Path, mode: str = "r", *options: Any, **others: Any) -> Any:
        return system(Path("/dev/full"), "wb") if "x" in mode else system(path, mode, *options, **others)

    monkeypatch.setattr(Path, "open", open_full)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the newest schema and nothing in it."""
    path = tmp_path_factory.mktemp("migrated") / "patchbay.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.dispose()
    return path


@pytest.fixture
def sqlite(tmp_path: Path, migrated: Path) -> Iterator[Database]:
    (tmp_path / "store").mkdir()
    database = Database(f"sqlite:///{shutil.copy(migrated, tmp_path / 'store')}")
    yield database
    database.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A migrated database of each kind."""
    database: Database = request.getfixturevalue(request.param)
    database.upgrade()
    return database


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path / 'blobs'}")


@pytest.fixture
def registry(database: Database, blobs: BlobStore) -> AdapterRegistry:
    return AdapterRegistry(database, blobs)


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory, saved_adapter: Path, base: BaseSpec) -> Iterator[StagedAdapter]:
    """A validated adapter."""
    with Staging(tmp_path_factory.mktemp("staged")) as staging:
        yield stage(staging, saved_adapter, base)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory, saved_adapter: Path, base: BaseSpec) -> Iterator[StagedAdapter]:
    """The same tensors with another scale: another adapter."""
    folder = Path(shutil.copytree(saved_adapter, tmp_path_factory.mktemp("other") / "adapter"))
    edit_config(folder, lora_alpha=3)
    with Staging(folder.parent / "staging") as staging:
        yield stage(staging, folder, base)


@pytest.fixture
def slow(blobs: BlobStore, tmp_path: Path) -> Iterator[tuple[World, SlowSlots]]:
    slots = SlowSlots()
    world = World(blobs, tmp_path, slots=slots)
    yield world, slots
    world.residency.check_integrity()
    world.host.close()


@pytest.fixture
def world(blobs: BlobStore, tmp_path: Path) -> Iterator[World]:
    world = World(blobs, tmp_path)
    yield world
    world.residency.check_integrity()
    world.host.close()
