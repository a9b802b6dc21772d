"""The shape of the project: what may import what, what may not be written at all, and a lock file that fits."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"gateway": ROOT / "gateway", "adapters_store": ROOT / "adapters_store"}
PACKAGES["lora_kernels"] = ROOT / "kernels" / "lora_kernels"

# Who may not import what. A folder's own rule is the one with the longest matching name.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "gateway": ("ray", "grpc", "gateway.server", "gateway.trainer"),
    "gateway.demo": (),  # a caller of the public API, over both wires
    "gateway.cli": ("grpc", "ray", "gateway.trainer", "gateway.engine"),  # serve starts gateway.server
    "gateway.client": ("gateway", "adapters_store", "lora_kernels", "ray", "grpc"),
    "gateway.rpc": ("ray", "gateway.server", "gateway.engine"),
    "gateway.server": (),
    "gateway.trainer": ("ray", "grpc", "gateway.server"),
    "gateway.engine": ("ray", "grpc", "gateway.server", "gateway.trainer"),
    "gateway.models": ("ray", "grpc", "gateway.server", "gateway.trainer", "gateway.engine"),
    "gateway.layers": ("ray", "grpc", "gateway.server", "gateway.trainer", "gateway.engine", "gateway.models"),
    "adapters_store": ("ray", "grpc", "gateway"),
    "lora_kernels": ("ray", "grpc", "gateway", "adapters_store", "transformers"),
}
# Readers that run what they read, and the switches that let others do so.
FORBIDDEN_CALLS = ("torch.load", "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads", "joblib.load", "eval")
FORBIDDEN_MODULES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def find_modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours, by its import name."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(part for part in parts if part != "__init__"), path


MODULES = list(find_modules())


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names that a module imports, in functions too; those under `if TYPE_CHECKING` are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def rule_of(module: str) -> tuple[str, ...]:
    return FORBIDDEN[max((name for name in FORBIDDEN if inside(module, name)), key=len)]


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    """Hugging Face ships a package named `kernels`; one of ours would break `import transformers`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_dependencies_run_one_way(module: str, path: Path) -> None:
    imported = set(imports(ast.parse(path.read_text())))
    crossed = {name for name in imported for forbidden in rule_of(module) if inside(name, forbidden)}
    assert not crossed, f"{module} may not import {', '.join(sorted(crossed))}"


def test_the_rule_sees_an_import_inside_a_function() -> None:
    source = "if TYPE_CHECKING:\n    import grpc\ndef f():\n    from ray import serve\n"
    assert list(imports(ast.parse(source))) == ["ray.serve"]


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_nothing_runs_what_it_reads(module: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {name for name in imports(tree) if name.partition(".")[0] in FORBIDDEN_MODULES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"
            trusted = [k for k in node.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"]
            assert not trusted, f"line {node.lineno}: trust_remote_code"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lora_kernels", ("triton", "transformers", "ray")),
        ("adapters_store", ("gateway", "ray", "grpc", "peft")),
        ("gateway.config", ("torch", "ray", "grpc")),
        ("gateway.client", ("torch", "ray", "grpc")),
    ],
)
def test_importing_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "[]"


def locked() -> dict[str, tuple[Version, Requirement]]:
    """The lock file's packages by name. Each line pins one version."""
    pins = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith(("#", "-c ")):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pins[canonicalize_name(requirement.name)] = (Version(specifier.version), requirement)
    return pins


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def project_requirements() -> list[Requirement]:
    """Of the project and all its extras; an extra that names the project's others adds none."""
    data = project()["project"]
    extras = data["optional-dependencies"].values()
    wanted = [Requirement(line) for line in [*data["dependencies"], *(line for extra in extras for line in extra)]]
    return [requirement for requirement in wanted if requirement.name != data["name"]]


def test_the_lock_satisfies_the_project() -> None:
    pins = locked()
    build = map(Requirement, project()["build-system"]["requires"])
    for requirement in [*project_requirements(), *build]:
        version, pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is locked"
        assert str(pinned.marker or "") in ("", str(requirement.marker or "")), requirement.name


def test_the_lock_is_complete_and_consistent() -> None:
    """Every package that a locked one requires here is locked too, at a version that suits."""
    pins = locked()
    open_ends = [requirement for requirement in project_requirements() if applies(requirement)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_ends:
        requirement = open_ends.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not locked"
        assert requirement.specifier.contains(pins[name][0], prereleases=True), requirement
        if (name, frozenset(requirement.extras)) not in seen:
            seen.add((name, frozenset(requirement.extras)))
            needed = map(Requirement, distribution(name).requires or ())
            open_ends += [one for one in needed if applies(one, requirement.extras) and not is_cuda(one)]
    assert len(seen) > 100


def applies(requirement: Requirement, extras: set[str] | None = None) -> bool:
    """Whether a requirement holds on this machine, for a package asked for with these extras."""
    marker = requirement.marker
    if marker is None:
        return True
    here = default_environment()
    return any(marker.evaluate({**here, "extra": extra}) for extra in ("", *(extras or ())))


def is_cuda(requirement: Requirement) -> bool:
    """What only torch's CUDA wheels ask for; requirements-cuda.lock pins those."""
    return canonicalize_name(requirement.name).startswith(("nvidia-", "cuda-"))


def test_the_cuda_lock_pins_only_cuda() -> None:
    lines = (ROOT / "requirements-cuda.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert pins
    assert all(is_cuda(pin) and str(pin.specifier).startswith("==") for pin in pins)
