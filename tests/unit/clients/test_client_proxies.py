"""Which proxy both clients use, and that a wrong proxy variable does not break construction."""

from __future__ import annotations

import pytest

from tests.unit.clients.fake_server import Connect, FakeServer, Reply
from unet_client import ConnectionFailed

BROKEN = {
    "garbage://secret": "scheme 'garbage' is not supported",
    "socks4://secret": "scheme 'socks4' is not supported",
    "://secret": "scheme '' is not supported",
    "socks5://secret:1080": "SOCKS requires the package socksio",
    "http://": "the URL has no host",
    "http://secret:port": "not a valid URL",
}


@pytest.fixture(autouse=True)
def no_socks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide socksio where it is installed."""
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "socksio" else find_spec(name, *rest),
    )


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_proxy_of_the_environment_is_used(
    fake: FakeServer, connect: Connect, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, fake.url.replace("http://", "http://user:password@"))
    with connect("http://unet.example:8000") as client:
        assert client.segment(b"image").content == b"image"
    (request,) = fake.requests
    assert request.path == "http://unet.example:8000/segment"
    assert request.headers["proxy-authorization"].startswith("Basic ")


def test_proxy_without_a_scheme_is_an_http_proxy(
    fake: FakeServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", fake.url.removeprefix("http://"))
    with connect("http://unet.example") as client:
        assert client.segment(b"image").content == b"image"


def test_https_uses_a_tunnel_through_the_proxy(
    fake: FakeServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", fake.url)
    fake.respond = lambda _: Reply(403)
    with (
        connect("https://unet.example") as client,
        pytest.raises(ConnectionFailed, match=r"https://unet\.example through 127.*HTTPS_PROXY"),
    ):
        client.segment(b"image")
    assert [(request.method, request.path) for request in fake.requests] == [
        ("CONNECT", "unet.example:443")
    ]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2", "127.255.255.254", "[::1]"]
)
def test_loopback_is_reached_without_the_proxy(
    fake: FakeServer, connect: Connect, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server listens on port 9 of these addresses."""
    monkeypatch.setenv("HTTP_PROXY", fake.url)
    monkeypatch.setenv("ALL_PROXY", fake.url)
    with connect(f"http://{host}:9") as client, pytest.raises(ConnectionFailed) as caught:
        client.segment(b"image")
    assert "through" not in str(caught.value)
    assert not fake.requests


@pytest.mark.parametrize("hosts", ["unet.invalid", "invalid", ".invalid", "unet.invalid:8000", "*"])
def test_hosts_in_no_proxy_are_reached_without_the_proxy(
    fake: FakeServer, connect: Connect, hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", fake.url)
    monkeypatch.setenv("NO_PROXY", hosts)
    with connect("http://unet.invalid:8000") as client, pytest.raises(ConnectionFailed) as caught:
        client.segment(b"image")
    assert "through" not in str(caught.value)
    assert not fake.requests


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "all_proxy"])
def test_broken_proxy_fails_the_request_with_the_name_of_the_variable(
    connect: Connect, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with connect("http://unet.example") as client:
        for call in (lambda: client.segment(b"image"), client.models):
            with pytest.raises(ConnectionFailed) as caught:
                call()
            message = str(caught.value)
            assert f"{variable} is not a usable proxy: {BROKEN[value]}" in message
            assert "secret" not in message


@pytest.mark.parametrize("value", BROKEN)
def test_broken_proxy_does_not_matter_for_loopback(
    fake: FakeServer, connect: Connect, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.setenv(variable, value)
    with connect(fake.url) as client:
        assert client.segment(b"image").content == b"image"


def test_broken_proxy_of_another_scheme_does_not_matter(
    fake: FakeServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", fake.url)
    monkeypatch.setenv("HTTPS_PROXY", "garbage://")
    with connect("http://unet.example") as client:
        assert client.segment(b"image").content == b"image"


def test_unreachable_proxy_is_named_without_its_password(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:password@127.0.0.1:9")
    with (
        connect("http://unet.example") as client,
        pytest.raises(ConnectionFailed, match=r"unet\.example through 127\.0\.0\.1:9 \(HTTP_PROXY"),
    ):
        client.segment(b"image")
