"""CustomResourceDefinitions of KEDA, Prometheus Operator, KServe and KubeRay, for an API server.

They are made from models that are published on PyPI and generated from the projects' own
definitions: cloudcoil-models-keda, cloudcoil-models-prometheus-operator and kserve. PyPI has none
of KubeRay: its fields are written here by its API reference, around the pods of Kubernetes. All
declare the same fields and types, without the rules that a webhook or a CEL expression checks.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

_ANYTHING: Schema = {"x-kubernetes-preserve-unknown-fields": True}
_NUMBER_OR_TEXT: Schema = {"x-kubernetes-int-or-string": True}
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_TEXTS_BY_NAME: Schema = {"type": "object", "additionalProperties": _TEXT}
_SCALARS = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}
_KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "required")


def custom_resource_definitions() -> list[dict[str, Any]]:
    """The definitions of ScaledObject, ServiceMonitor, InferenceService and RayService."""
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    _import_only_models("kserve")
    models = importlib.import_module("kserve.models")
    return [
        _definition("keda.sh", "v1alpha1", "ScaledObject", _from_pydantic(ScaledObject)),
        _definition(
            "monitoring.coreos.com", "v1", "ServiceMonitor", _from_pydantic(ServiceMonitor)
        ),
        _definition(
            "serving.kserve.io",
            "v1beta1",
            "InferenceService",
            _from_openapi("V1beta1InferenceServiceSpec", models),
        ),
        _definition("ray.io", "v1", "RayService", _ray_service()),
    ]


def _ray_service() -> Schema:
    """The structural schema of the `spec` of a RayService.

    Fields and requirements are those of KubeRay's API reference for ray.io/v1, as of version 1.4.
    Later fields are rejected.
    """
    client = importlib.import_module("kubernetes.client")

    def kubernetes(name: str) -> Schema:
        return _from_openapi(name, client)

    group = {
        "template": kubernetes("V1PodTemplateSpec"),
        "rayStartParams": _TEXTS_BY_NAME,
    }
    head = {
        **group,
        "headService": kubernetes("V1Service"),
        "enableIngress": _FLAG,
        "serviceType": _TEXT,
    }
    worker = {
        **group,
        "groupName": _TEXT,
        "replicas": _COUNT,
        "minReplicas": _COUNT,
        "maxReplicas": _COUNT,
        "idleTimeoutSeconds": _COUNT,
        "numOfHosts": _COUNT,
        "suspend": _FLAG,
        "scaleStrategy": _object({"workersToDelete": {"type": "array", "items": _TEXT}}),
    }
    autoscaler = {
        "resources": kubernetes("V1ResourceRequirements"),
        "image": _TEXT,
        "imagePullPolicy": _TEXT,
        "securityContext": kubernetes("V1SecurityContext"),
        "idleTimeoutSeconds": _COUNT,
        "upscalingMode": {**_TEXT, "enum": ["Default", "Aggressive", "Conservative"]},
        "version": {**_TEXT, "enum": ["v1", "v2"]},
        "env": kubernetes("list[V1EnvVar]"),
        "envFrom": kubernetes("list[V1EnvFromSource]"),
        "volumeMounts": kubernetes("list[V1VolumeMount]"),
    }
    credential = _object({"value": _TEXT, "valueFrom": kubernetes("V1EnvVarSource")})
    fault_tolerance = {
        "redisUsername": credential,
        "redisPassword": credential,
        "externalStorageNamespace": _TEXT,
        "redisAddress": _TEXT,
    }
    workers = _object(worker, required=["groupName", "minReplicas", "maxReplicas", "template"])
    cluster = {
        "suspend": _FLAG,
        "managedBy": _TEXT,
        "autoscalerOptions": _object(autoscaler),
        "headServiceAnnotations": _TEXTS_BY_NAME,
        "enableInTreeAutoscaling": _FLAG,
        "gcsFaultToleranceOptions": _object(fault_tolerance, required=["redisAddress"]),
        "headGroupSpec": _object(head, required=["template"]),
        "rayVersion": _TEXT,
        "workerGroupSpecs": {"type": "array", "items": workers},
    }
    return _object(
        {
            "serveConfigV2": _TEXT,
            "rayClusterConfig": _object(cluster, required=["headGroupSpec"]),
            "serviceUnhealthySecondThreshold": _COUNT,
            "deploymentUnhealthySecondThreshold": _COUNT,
            "serveService": kubernetes("V1Service"),
            "upgradeStrategy": _object({"type": _TEXT}),
            "excludeHeadPodFromServeSvc": _FLAG,
        }
    )


def _object(properties: dict[str, Schema], required: Sequence[str] = ()) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def _definition(group: str, version: str, kind: str, spec: Schema) -> dict[str, Any]:
    plural = f"{kind.lower()}s"
    schema = {
        "type": "object",
        "properties": {"spec": spec, "status": {**_ANYTHING, "type": "object"}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": {**schema, "required": ["spec"]}},
                }
            ],
        },
    }


def _from_pydantic(model: Any) -> Schema:
    """The structural schema of a resource's `spec`, from a pydantic model of the resource."""
    schema = model.model_json_schema(by_alias=True)
    return _structural(schema["properties"]["spec"], schema["$defs"])


def _structural(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" in schema:
        return _structural(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for combined in ("anyOf", "allOf", "oneOf"):
        if combined in schema:
            choices = [each for each in schema[combined] if each.get("type") != "null"]
            if len(choices) == 1:
                return _structural(choices[0], definitions)
            return dict(_NUMBER_OR_TEXT)
    found = {key: schema[key] for key in _KEPT if key in schema}
    if "const" in schema:
        found["enum"] = [schema["const"]]
    if "items" in schema:
        found["items"] = _structural(schema["items"], definitions)
    if schema.get("properties"):
        found["properties"] = {
            name: _structural(each, definitions) for name, each in schema["properties"].items()
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = _structural(schema["additionalProperties"], definitions)
    elif schema.get("type", "object") == "object":
        found |= _ANYTHING
    return found


def _import_only_models(package: str) -> None:
    """Let `package.models` be imported without `package` itself, which needs a whole server."""
    for folder in sys.path:
        if (Path(folder) / package / "models").is_dir():
            module = types.ModuleType(package)
            module.__path__ = [str(Path(folder) / package)]
            sys.modules[package] = module
            return
    raise ModuleNotFoundError(package)


def _from_openapi(name: str, models: Any) -> Schema:
    """The structural schema of a type, by its name in models that OpenAPI Generator wrote."""
    if name in _SCALARS:
        return {"type": _SCALARS[name]}
    if found := re.fullmatch(r"list\[(.*)\]", name):
        return {"type": "array", "items": _from_openapi(found[1], models)}
    if found := re.fullmatch(r"dict\(str, (.*)\)", name):
        return {"type": "object", "additionalProperties": _from_openapi(found[1], models)}
    if name.endswith(("Quantity", "IntOrString")):
        return dict(_NUMBER_OR_TEXT)
    model = getattr(models, name, None) or _kubernetes_model(name)
    if model is None or not model.openapi_types:
        return dict(_ANYTHING)
    properties = {
        model.attribute_map[attribute]: _from_openapi(kind, models)
        for attribute, kind in model.openapi_types.items()
    }
    return {"type": "object", "properties": properties}


def _kubernetes_model(name: str) -> Any:
    client = importlib.import_module("kubernetes.client")
    # V1Container, and K8sIoApiAppsV1DeploymentStrategy
    short = re.sub(r"^K8sIoApi[A-Z][a-z]+(?=V\d)", "", name)
    return getattr(client, short, None)
