"""The Kubernetes manifests: valid for Kubernetes and KubeRay, no privileges, and in step with the code."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from gateway.config import DATABASE_URL_VARIABLE, GatewayConfig, from_dict
from tests.deploy.manifests import BASE, GPU, ROOT, Manifest, find, load

SCHEMAS = Path(__file__).parent / "schemas"
CUSTOM = {"RayService": "rayservice-v1.json", "PodMonitor": "podmonitor-v1.json"}
OVERLAYS = {"base": BASE, "gpu": GPU}


@pytest.fixture(params=sorted(OVERLAYS))
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return load(OVERLAYS[request.param])


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused, wherever it names the known ones."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    is_schema = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_schema and not free:
        # Kubernetes itself defines what metadata holds, where a CRD says no more than "object".
        made["additionalProperties"] = False
    return made


def check_custom(manifest: Manifest) -> None:
    schema = json.loads((SCHEMAS / CUSTOM[manifest["kind"]]).read_text())
    jsonschema.Draft202012Validator(closed(schema)).validate(manifest)


def pods(manifests: list[Manifest]) -> dict[str, tuple[Manifest, Manifest]]:
    """Of each group of the Ray cluster: its own fields and its pod's."""
    cluster = find(manifests, "RayService")["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: (group, group["template"]) for name, group in groups.items()}


def config_of(manifests: list[Manifest]) -> GatewayConfig:
    data = find(manifests, "ConfigMap")["data"]["patchbay.yaml"]
    return from_dict(GatewayConfig, yaml.safe_load(data))


def test_every_manifest_fits_its_schema(manifests: list[Manifest]) -> None:
    kinds = set()
    for manifest in manifests:
        kinds.add(manifest["kind"])
        if manifest["kind"] in CUSTOM:
            check_custom(manifest)
        else:
            kubernetes_validate.validate(manifest, "1.33", strict=True)
    assert kinds == {
        "ConfigMap",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "PodMonitor",
        "RayService",
        "Service",
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "imagePull"), "x"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplica"), 2),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"), "two"),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "on"),
        (("spec", "serveConfig"), ""),
    ],
)
def test_the_rayservice_schema_refuses_what_kuberay_would(path: tuple[str | int, ...], value: object) -> None:
    manifest: Any = find(load(BASE), "RayService")
    place = manifest
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check_custom(manifest)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_the_overlays_are_what_kustomize_makes(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(OVERLAYS[overlay])]
    made = list(yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True, text=True).stdout))

    def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
        return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}

    assert by_name(made) == by_name(load(OVERLAYS[overlay]))


def test_pods_have_no_privileges(manifests: list[Manifest]) -> None:
    """The restricted pod security standard, a read-only root, and no token of the Kubernetes API."""
    for _, template in pods(manifests).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in spec["volumes"])
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_mounts_have_their_volumes_and_claims(manifests: list[Manifest]) -> None:
    config_map = find(manifests, "ConfigMap")["metadata"]["name"]
    for _, template in pods(manifests).values():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        (container,) = template["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["config"]["configMap"]["name"] == config_map
        if "data" in volumes:
            claim = volumes["data"]["persistentVolumeClaim"]["claimName"]
            assert find(manifests, "PersistentVolumeClaim")["metadata"]["name"] == claim


def test_ports_are_those_of_the_configuration(manifests: list[Manifest]) -> None:
    config = config_of(manifests)
    ports = {
        name: {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        for name, (_, template) in pods(manifests).items()
    }
    assert ports["gateway"] == {"http": config.server.http_port, "grpc": config.server.grpc_port}
    assert ports["engine"] == {"metrics": config.server.replica_metrics_port}
    assert config.server.host == "0.0.0.0"


def test_services_select_pods_that_have_their_ports(manifests: list[Manifest]) -> None:
    services = [manifest["spec"] for manifest in manifests if manifest["kind"] == "Service"]
    assert len(services) == 3
    for service in services:
        selected = [
            {port["name"] for port in template["spec"]["containers"][0]["ports"]}
            for _, template in pods(manifests).values()
            if service["selector"].items() <= template["metadata"]["labels"].items()
        ]
        assert len(selected) == 1
        assert {port["targetPort"] for port in service["ports"]} <= selected[0]


def test_everything_with_metrics_is_scraped_once(manifests: list[Manifest]) -> None:
    config = config_of(manifests)
    assert not config.server.metrics_aggregate
    monitor = find(manifests, "PodMonitor")["spec"]
    scraped = [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]]
    for name, (_, template) in pods(manifests).items():
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        has = [port["name"] for port in template["spec"]["containers"][0]["ports"] if port["name"] in scraped]
        assert len(has) == (0 if name == "head" else 1)


def test_every_pod_is_under_the_default_policy(manifests: list[Manifest]) -> None:
    policy = find(manifests, "NetworkPolicy", "patchbay")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for _, template in pods(manifests).values():
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_only_gateways_take_calls_from_outside(manifests: list[Manifest]) -> None:
    policies = [manifest["spec"] for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    open_to_all = [
        (policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"], port["port"])
        for policy in policies
        for rule in policy.get("ingress", [])
        if {"namespaceSelector": {}} in rule["from"]
        for port in rule["ports"]
    ]
    assert open_to_all == [("gateway", "http"), ("gateway", "grpc")]


def test_the_cluster_has_room_for_exactly_the_actors(manifests: list[Manifest]) -> None:
    """A front door to a gateway pod; a whole engine pod for each replica and for the trainer."""
    config, groups = config_of(manifests), pods(manifests)
    gateway, engine = groups["gateway"][0], groups["engine"][0]
    assert config.server.front_door_resource is not None
    unit = json.loads(json.loads(gateway["rayStartParams"]["resources"]))
    assert unit == {config.server.front_door_resource: 1}
    assert gateway["replicas"] == config.server.num_front_doors
    assert engine["replicas"] == config.server.num_replicas + 1
    cpus = float(engine["rayStartParams"]["num-cpus"])
    assert cpus == config.server.replica_num_cpus == config.trainer.num_cpus
    assert float(gateway["rayStartParams"]["num-cpus"]) < config.trainer.num_cpus
    limits = groups["engine"][1]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits.get("nvidia.com/gpu", 0)) == config.server.replica_num_gpus == config.trainer.num_gpus


def test_the_gpu_overlay_asks_for_gpus() -> None:
    assert config_of(load(GPU)).server.replica_num_gpus == 1
    assert config_of(load(BASE)).server.replica_num_gpus == 0


def test_the_database_comes_from_a_secret(manifests: list[Manifest]) -> None:
    assert config_of(manifests).store.database_url is None
    for name in ("gateway", "engine"):
        (variable,) = pods(manifests)[name][1]["spec"]["containers"][0]["env"]
        assert variable["name"] == DATABASE_URL_VARIABLE
        assert variable["valueFrom"]["secretKeyRef"]["key"] == "url"


def test_the_secrets_database_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATABASE_URL_VARIABLE, "postgresql+psycopg://db/patchbay")
    assert config_of(load(BASE)).store.database == "postgresql+psycopg://db/patchbay"


def test_probes_ask_routes_that_exist(manifests: list[Manifest]) -> None:
    from gateway.server.auth import HTTP_POLICY, Access

    probe = pods(manifests)["gateway"][1]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
    assert probe == {"path": "/readyz", "port": "http"}
    assert HTTP_POLICY["GET", probe["path"]] is Access.PUBLIC


def test_serve_can_deploy_the_application(manifests: list[Manifest], tmp_path: Path) -> None:
    """serveConfigV2 is Serve's own schema, and its builder accepts the ConfigMap's file."""
    from ray.serve.schema import ServeDeploySchema

    from gateway.server import app as module

    data = yaml.safe_load(find(manifests, "RayService")["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(data)
    assert schema.proxy_location == "Disabled"
    (application,) = schema.applications
    assert application.import_path == f"{module.__name__}:app"
    mounted = Path(application.args["config"])
    for _, template in pods(manifests).values():
        mounts = {m["name"]: m["mountPath"] for m in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounted.parent == Path(mounts["config"])
    file = tmp_path / mounted.name
    file.write_text(find(manifests, "ConfigMap")["data"][mounted.name])
    front_door = module.app({"config": str(file)})._bound_deployment
    assert front_door.num_replicas == config_of(manifests).server.num_front_doors
    assert front_door.ray_actor_options["resources"] == {"gateway": 1}


def test_versions_agree(manifests: list[Manifest]) -> None:
    import ray

    cluster = find(manifests, "RayService")["spec"]["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "requirements.lock").read_text()
    assert cluster["rayVersion"] == ray.__version__
    images = {t["spec"]["containers"][0]["image"] for _, t in pods(manifests).values()}
    assert images == {f"patchbay:{version('patchbay')}"}
