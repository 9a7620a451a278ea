"""Runs etcd and kube-apiserver on the loopback address, with kubectl and helm as their clients.

Without a scheduler and kubelets nothing is ever started.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

READY_TIMEOUT_S = 120.0


class ApiServer:
    """A running API server.

    Attributes:
        version: for example v1.20.2.
    """

    def __init__(self, port: int, token: str) -> None:
        self._kubectl = [
            "kubectl", "--kubeconfig=/dev/null", f"--server=https://127.0.0.1:{port}",
            "--insecure-skip-tls-verify", f"--token={token}", "--request-timeout=20s",
        ]  # fmt: skip
        self._helm = [
            "helm", "--kubeconfig=/dev/null", f"--kube-apiserver=https://127.0.0.1:{port}",
            "--kube-insecure-skip-tls-verify", f"--kube-token={token}", "--namespace=default",
        ]  # fmt: skip
        self.version = ""

    def is_ready(self) -> bool:
        """Whether it serves requests and knows its own namespaces."""
        return not self._run("get", "--raw", "/readyz") and not self._run("get", "ns", "default")

    def read_version(self) -> None:
        """Ask for its version."""
        answer = self._output("get", "--raw", "/version")
        self.version = json.loads(answer)["gitVersion"]

    def define(self, definitions: Sequence[dict[str, Any]]) -> None:
        """Create custom resource definitions and wait until they are served.

        Raises:
            RuntimeError: it rejects one.
        """
        for definition in definitions:
            name = definition["metadata"]["name"]
            message = self._run("create", "-f", "-", text=json.dumps(definition))
            if message:
                raise RuntimeError(f"{name}: {message}")
        deadline = time.monotonic() + READY_TIMEOUT_S
        for definition in definitions:
            kind = ".".join((definition["spec"]["names"]["plural"], definition["spec"]["group"]))
            while message := self._run("get", kind):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{kind}: {message}")
                time.sleep(0.25)

    def try_apply(self, item: dict[str, Any]) -> str:
        """Apply an object server-side as a dry run; returns the error, or nothing."""
        return self._run(
            "apply", "--server-side", "--dry-run=server", "-n", "default", "-f", "-",
            text=json.dumps(item),
        )  # fmt: skip

    def run_helm(self, *arguments: str) -> str:
        """Run helm against the server; returns its error, or nothing."""
        return _run_program([*self._helm, *arguments])

    def read(self, kinds: str, name: str, output: str) -> str:
        """Read an object, or all of these kinds, in a form of output of kubectl.

        Raises:
            subprocess.CalledProcessError: it does not exist.
        """
        names = [name] if name else []
        return self._output("get", kinds, *names, "-n", "default", "-o", output)

    def _run(self, *arguments: str, text: str = "") -> str:
        return _run_program([*self._kubectl, *arguments], text)

    def _output(self, *arguments: str) -> str:
        command = [*self._kubectl, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout


def _run_program(command: Sequence[str], text: str = "") -> str:
    run = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    return "" if run.returncode == 0 else run.stderr.strip() or "failed without a message"


@contextmanager
def run_api_server(binary: Path, folder: Path) -> Iterator[ApiServer]:
    """Start etcd and the API server, with their data in `folder`; ends both.

    Raises:
        RuntimeError: the server did not become ready. The message has the end of its log.
    """
    etcd_port, peer_port, port = _free_ports(3)
    token = secrets.token_hex(16)
    key = folder / "service-account.key"
    command = ["openssl", "genrsa", "-out", str(key), "2048"]
    subprocess.run(command, check=True, capture_output=True)
    tokens = folder / "tokens.csv"
    tokens.write_text(f'{token},admin,1,"system:masters"\n')
    etcd = f"http://127.0.0.1:{etcd_port}"
    with ExitStack() as stack:
        processes = [
            stack.enter_context(_running(folder / "etcd.log", [
                "etcd", f"--data-dir={folder}/etcd", f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}", "--unsafe-no-fsync",
                f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
            ])),
            stack.enter_context(_running(folder / "kube-apiserver.log", [
                str(binary), f"--etcd-servers={etcd}", "--bind-address=127.0.0.1",
                f"--secure-port={port}", f"--cert-dir={folder}/certificates",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={key}", f"--service-account-key-file={key}",
                "--service-cluster-ip-range=10.96.0.0/24", f"--token-auth-file={tokens}",
                "--authorization-mode=RBAC", "--endpoint-reconciler-type=none",
                "--disable-admission-plugins=ServiceAccount",
            ])),
        ]  # fmt: skip
        server = ApiServer(port, token)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not server.is_ready():
            ended = [process.args for process in processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                log = (folder / "kube-apiserver.log").read_text()[-2000:]
                raise RuntimeError(f"the API server did not start: {log}")
            time.sleep(0.25)
        server.read_version()
        yield server


@contextmanager
def _running(log: Path, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback address that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
