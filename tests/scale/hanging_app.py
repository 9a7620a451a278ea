"""The deployment of `deploy.ray.serve_app` with an engine that hangs on an image of one value."""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve

from deploy.ray.serve_app import HealthCheck, build_app
from tools.prove.faulty import FaultyEngine


def build_hanging_app() -> FastAPI:
    return build_app(lambda engine: FaultyEngine(engine, "hang"))


@serve.deployment(name="unet-server")
@serve.ingress(build_hanging_app)
class Replica(HealthCheck):
    """One copy of the service."""


app = Replica.bind()
