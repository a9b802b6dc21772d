"""Which files an upload may hold, by name: kept, ignored, or refused with the reason."""

from __future__ import annotations

from typing import Final

from adapters_store.errors import AdapterInvalid
from adapters_store.strict_json import shown

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ADAPTERHUB_WEIGHTS_FILE: Final = "adapter.safetensors"
PATCHBAY_FILE: Final = "patchbay.json"
GOLDEN_FILE: Final = "golden.json"

WEIGHTS_FILES: Final = (WEIGHTS_FILE, ADAPTERHUB_WEIGHTS_FILE)
"""What peft and the package `adapters` call the tensors: an upload has one of the two."""

KEPT_FILES: Final = {
    CONFIG_FILE: 1 << 20,
    WEIGHTS_FILE: 1 << 62,
    ADAPTERHUB_WEIGHTS_FILE: 1 << 62,
    PATCHBAY_FILE: 64 << 10,
    GOLDEN_FILE: 256 << 10,
}
"""The files that are read, each with its largest size in bytes."""

_IGNORED: Final = frozenset(
    {
        ".DS_Store",
        ".gitattributes",
        ".gitignore",
        "LICENSE",
        "LICENSE.txt",
        "README.md",
        "added_tokens.json",
        "all_results.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "eval_results.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "train_results.json",
        "trainer_log.jsonl",
        "trainer_state.json",
        "training_args.bin",
        "vocab.json",
    }
)
_HEADS: Final = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")


def split_name(path: str) -> tuple[str, str]:
    """The folder ("" for none) and file name of an upload's path. Raises `AdapterInvalid` for an unsafe path."""
    name = shown(path)
    if "\0" in path or "\\" in path:
        raise AdapterInvalid("the path holds a NUL or a backslash", file=name)
    if path.startswith("/") or path[1:2] == ":":
        raise AdapterInvalid("the path is absolute; paths must lie inside the upload", file=name)
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise AdapterInvalid("the path leads outside the upload", file=name)
    if not parts:
        raise AdapterInvalid("the file has no name", file=name)
    if len(parts) > 2 and parts[0] != "__MACOSX":
        raise AdapterInvalid("the file lies in nested folders; one folder with its files is accepted", file=name)
    return "/".join(parts[:-1]), parts[-1]


def is_kept(folder: str, name: str) -> bool:
    """Whether to keep a file; False for the harmless ones beside it. Raises `AdapterInvalid` for all others."""
    if name in KEPT_FILES and not folder.startswith("__MACOSX"):
        return True
    if name in _IGNORED or name.startswith("._") or folder.startswith("__MACOSX"):
        return False
    if name in _HEADS:
        raise AdapterInvalid("prediction heads are not served; save_adapter with with_head=False", file=name)
    if name.lower().endswith(_PICKLES):
        reason = (
            f"pickled files are never opened; save the adapter with safe_serialization=True (peft) or "
            f"use_safetensors=True (adapters), or its tensors by safetensors.torch.save_file, and upload {WEIGHTS_FILE}"
        )
        raise AdapterInvalid(reason, file=shown(name))
    raise AdapterInvalid(f"is not part of an adapter; upload {CONFIG_FILE} and {WEIGHTS_FILE}", file=shown(name))
