from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import BaseModelUnsupported
from gateway.models.config import DecoderConfig
from tests.tiny import make_base


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = edit(make_base(tmp_path), **changes)
    with pytest.raises(BaseModelUnsupported, match=named):
        DecoderConfig.from_folder(folder)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match=r"config\.json"):
        DecoderConfig.from_folder(tmp_path)


def test_sliding_windows_follow_the_layer_types(tmp_path: Path) -> None:
    folder = make_base(tmp_path, "qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert DecoderConfig.from_folder(folder).sliding_windows == (None, 8)


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    folder = make_base(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert DecoderConfig.from_folder(folder).eos_token_ids == (2, 0)
