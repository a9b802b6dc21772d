"""The image: what it copies exists, it runs as nobody in particular, and it starts the command that we have."""

from __future__ import annotations

import json
import re
import tomllib

from packaging.requirements import Requirement

from gateway.cli.serve import configure
from gateway.config import ServerConfig
from tests.deploy.manifests import BASE, ROOT, find, load

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if re.match("[A-Z]+ ", line)]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def test_copied_files_exist_and_reach_the_build() -> None:
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    sources = {s for line in arguments("COPY") if "--from" not in line for s in line.split()[:-1]}
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)


def test_it_runs_as_the_user_of_the_manifests() -> None:
    (user,) = arguments("USER")
    context = find(load(BASE), "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert user == f"{context['securityContext']['runAsUser']}:{context['securityContext']['runAsGroup']}"


def test_it_serves_on_the_exposed_ports() -> None:
    (entrypoint,), (command,), (exposed,) = arguments("ENTRYPOINT"), arguments("CMD"), arguments("EXPOSE")
    assert json.loads(entrypoint) == ["patchbay"]
    subcommand, flag, host = json.loads(command)
    assert (subcommand, flag) == ("serve", "--host")
    assert configure(None, server={"host": host}).server.host == "0.0.0.0"
    assert exposed.split() == [str(ServerConfig().http_port), str(ServerConfig().grpc_port)]


def test_the_driver_that_the_image_adds_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    assert {Requirement(line).name for line in extras["postgresql"]} <= pinned
