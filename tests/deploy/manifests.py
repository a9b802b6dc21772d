"""Reads the manifests as kustomize would: the base's resources, and an overlay's JSON patches (RFC 6902) on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy" / "k8s" / "base"
GPU = ROOT / "deploy" / "k8s" / "overlays" / "gpu"

Manifest = dict[str, Any]


def load(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization. Only `resources` and JSON `patches` with a target are understood."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(kustomization) - {"apiVersion", "kind", "resources", "patches"}
    assert not unknown, f"{folder}: {unknown} would be ignored here"
    manifests: list[Manifest] = []
    for name in kustomization["resources"]:
        path = folder / name
        manifests += load(path.resolve()) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", []):
        _patch(manifests, patch["target"], yaml.safe_load((folder / patch["path"]).read_text()))
    return manifests


def find(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one manifest of this kind (and name)."""
    (found,) = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return found


def _patch(manifests: list[Manifest], target: dict[str, str], operations: list[dict[str, Any]]) -> None:
    manifest = find(manifests, target["kind"], target["name"])
    version = "/".join(filter(None, (target.get("group"), target["version"])))
    assert manifest["apiVersion"] == version
    for operation in operations:
        _apply(manifest, copy.deepcopy(operation))


def _apply(document: Any, operation: dict[str, Any]) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        document = document[int(part)] if isinstance(document, list) else document[part]
    if operation["op"] == "add" and isinstance(document, list):
        assert last == "-", "only appending is understood"
        document.append(operation["value"])
        return
    assert operation["op"] in ("add", "replace"), operation["op"]
    assert operation["op"] == "add" or last in document, f"nothing to replace at {operation['path']}"
    document[last] = operation["value"]
