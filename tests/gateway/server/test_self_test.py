"""The self-test of uploads that it once failed: trained tokens, long golden prompts, a store that comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from safetensors.torch import load_file, save_file

from adapters_store.errors import StoreUnavailable
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors
from tests.tiny import make_adapter, make_base

CONTEXT = 512
EMBED = "model.embed_tokens"
IDS = [7, 250, 301]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "untied", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "r4", seed=1)


@pytest.fixture(scope="module")
def doors(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    doors = Doors(base, tmp_path_factory.mktemp("doors") / "data")
    doors.start()
    yield doors
    doors.stop()


def trained_tokens(base: Path, folder: Path, path: str, ids: list[int], changed: list[int]) -> Path:
    """A peft folder with rows of the module at `path` alone: the base's, but for those that training changed."""
    folder.mkdir()
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids, "target_modules": [path.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weight = load_file(base / "model.safetensors")[f"{path}.weight"]
    weight[changed] *= 0.8
    tensors = {f"base_model.model.{path}.trainable_tokens_delta": weight[ids]}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("path", "ids", "changed"),
    [
        (EMBED, IDS, IDS),
        (EMBED, IDS, IDS[:1]),
        (EMBED, IDS, IDS[-1:]),
        (EMBED, list(range(300)), [299]),
        ("lm_head", IDS, IDS),
    ],
    ids=["all", "the first", "the last", "of more than fit twice", "the head"],
)
def test_trained_tokens_are_seen_where_no_usual_prompt_has_them(
    tenant: TenantClient, base: Path, tmp_path: Path, path: str, ids: list[int], changed: list[int]
) -> None:
    answer = tenant.upload("tokens", trained_tokens(base, tmp_path / "tokens", path, ids, changed))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [EMBED, "lm_head"])
def test_trained_tokens_that_are_the_bases_change_nothing(
    tenant: TenantClient, base: Path, tmp_path: Path, path: str
) -> None:
    answer = tenant.upload("tokens", trained_tokens(base, tmp_path / "tokens", path, IDS, changed=[]))
    assert answer.status_code == 422, answer.text
    assert "it changes nothing" in answer.json()["error"]["message"]


def test_a_golden_prompt_is_compared_in_tokens_and_beyond_the_default_length(
    doors: Doors, tenant: TenantClient, adapter: Path, tmp_path: Path
) -> None:
    tenant.upload("helper", adapter)
    said = tenant.openai.completions.create(
        model=f"{tenant.id}/helper", prompt="the quick", temperature=0, max_tokens=400
    )
    completion = said.choices[0].text
    assert said.usage is not None
    assert said.usage.completion_tokens > doors.context.config.engine.default_max_tokens
    assert len(completion.encode()) > CONTEXT
    folder = Path(shutil.copytree(adapter, tmp_path / "golden"))
    for wanted, passes in ((completion, True), (f"{completion[:-1]}~", False)):
        (folder / "golden.json").write_text(json.dumps([{"prompt": "the quick", "completion": wanted}]))
        answer = tenant.upload("helper", folder)
        assert (answer.status_code == 200) == passes, answer.text
    assert "golden prompt 1: it says" in answer.json()["error"]["message"]


def test_a_test_waits_for_the_store(
    doors: Doors, tenant: TenantClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, timeouts = doors.context.blobs, iter(range(2))
    open_blob = blobs.open

    def timing_out(digest: str) -> BinaryIO:
        if next(timeouts, None) is not None:
            raise StoreUnavailable("the blob store cannot be read: ConnectTimeout")
        return open_blob(digest)

    monkeypatch.setattr(blobs, "open", timing_out)
    unread = make_adapter(doors.base, tmp_path / "unread", rank=8, seed=5)
    assert tenant.upload("helper", unread).json()["status"] == "ready"
    assert next(timeouts, None) is None
