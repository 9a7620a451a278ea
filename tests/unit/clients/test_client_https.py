"""Both clients over TLS."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.clients.fake_server import Connect, FakeServer, Reply
from unet_client import ConnectionFailed, ResponseTimeout


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to create a certificate")
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = (
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
        f"-subj /CN=unet -addext subjectAltName=IP:127.0.0.1 -keyout {path} -out {path}.crt"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def secure(fake: FakeServer, certificate: Path) -> str:
    """The https URL of the fake server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    fake.socket = context.wrap_socket(fake.socket, server_side=True)
    return fake.url.replace("http://", "https://")


def test_https_works_with_a_certificate_that_the_environment_trusts(
    secure: str, connect: Connect, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    image = bytes(1_000_000)
    with connect(secure) as client:
        assert client.segment(image).content == image


def test_https_rejects_an_unknown_certificate(secure: str, connect: Connect) -> None:
    with connect(secure) as client, pytest.raises(ConnectionFailed, match="certificate"):
        client.segment(b"image")


def test_slow_response_over_https_ends_at_the_timeout(
    fake: FakeServer,
    secure: str,
    connect: Connect,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    fake.respond = lambda _: Reply(body=fake.drip())
    with connect(secure, timeout=0.5) as client:
        start = time.monotonic()
        with pytest.raises(ResponseTimeout):
            client.segment(b"image")
        assert time.monotonic() - start < 4
