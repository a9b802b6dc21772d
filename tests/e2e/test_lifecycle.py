"""A tenant's versions from upload to rollback, through real processes and the official client."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.e2e.conftest import Patchbay
from tests.tiny import edited_adapter, overflowing

FILES = ("adapter_config.json", "adapter_model.safetensors")


def ask(client: openai.OpenAI, **more: Any) -> tuple[str, str]:
    """The version that answers, and what."""
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}} | more
    answer = client.completions.create(model="acme/life", prompt="Once upon a time", **settings)
    return answer.model, answer.choices[0].text


def test_a_broken_upload_is_quarantined_while_traffic_goes_on(
    patchbay: Patchbay, adapter_folders: list[Path], tmp_path: Path
) -> None:
    client = patchbay.openai("acme")
    patchbay.upload("acme", "acme/life", adapter_folders[0])
    good = ask(client)
    with ThreadPoolExecutor(1) as uploader:
        for name, edit in (("zero", lambda _, tensor: torch.zeros_like(tensor)), ("overflow", overflowing)):
            broken = edited_adapter(adapter_folders[1], tmp_path / name, edit)
            files = [("files", (file, (broken / file).read_bytes())) for file in FILES]
            with patchbay.http("acme") as http:
                upload = uploader.submit(http.post, "/v1/adapters", data={"name": "acme/life"}, files=files)
                assert ask(client) == good
                while not upload.done():
                    assert ask(client) == good
                response = upload.result()
                assert response.status_code == 422, response.text
                listed = http.get("/v1/adapters/acme/life").json()
            error = response.json()["error"]
            assert (error["code"], error["report"]["passed"]) == ("self_test_failed", False)
            assert listed["aliases"] == {"default": 1}
            last = listed["versions"][-1]
            assert (last["ref"], last["status"]) == (error["version"], "quarantined")
            assert ask(client) == good


def test_a_canary_is_split_promoted_and_rolled_back(patchbay: Patchbay, adapter_folders: list[Path]) -> None:
    client, path = patchbay.openai("acme"), "/v1/adapters/acme/life"
    first = patchbay.upload("acme", "acme/life", adapter_folders[0])["version"]
    second = patchbay.upload("acme", "acme/life", adapter_folders[2])["version"]
    users = [f"user-{i}" for i in range(30)]

    def sides() -> list[str]:
        return [ask(client, user=user, max_tokens=1)[0] for user in users]

    with patchbay.http("acme") as http:
        canary = {"version": second, "percent": 40}
        http.put(f"{path}/aliases/default", json={"version": first, "canary": canary}).raise_for_status()
        split = sides()
        assert 3 <= split.count(f"acme/life:{second}") <= 21
        assert split.count(f"acme/life:{first}") == len(users) - split.count(f"acme/life:{second}")
        assert sides() == split
        refused = http.delete(f"{path}/versions/{second}")
        assert (refused.status_code, "@default" in refused.json()["error"]["message"]) == (409, True)
        http.post(f"{path}/rollback", json={}).raise_for_status()
        assert set(sides()) == {f"acme/life:{first}"}
        http.put(f"{path}/aliases/default", json={"version": second}).raise_for_status()
        assert set(sides()) == {f"acme/life:{second}"}


def test_a_deleted_version_finishes_its_stream_and_then_loses_its_bytes(
    patchbay: Patchbay, adapter_folders: list[Path], tmp_path: Path
) -> None:
    own = edited_adapter(adapter_folders[1], tmp_path / "own", lambda _, tensor: 0.9 * tensor)
    version = patchbay.upload("acme", "acme/brief", own, alias="only")
    patchbay.upload("acme", "acme/brief", adapter_folders[0], alias="only")
    client = patchbay.openai("acme").with_options(_extra_kwargs={"_strict_response_validation": False})
    stream = client.completions.create(
        model=version["ref"], prompt="Once", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    with patchbay.http("acme") as http:
        assert http.delete(f"/v1/adapters/acme/brief/versions/{version['version']}").json()["deleted"] is True
    with pytest.raises(openai.NotFoundError):
        patchbay.openai("acme").completions.create(model=version["ref"], prompt="x")
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    blob = patchbay.data / "blobs" / version["digest"][:2] / version["digest"]
    deadline = time.monotonic() + 30
    while blob.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
