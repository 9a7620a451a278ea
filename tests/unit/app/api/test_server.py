"""The listening socket."""

from __future__ import annotations

import socket
import sys

import pytest

from app.api.server import format_url, listen, reject_new_connections
from app.errors import SettingsError


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tcp_nodelay_is_set(host: str) -> None:
    """A response is two packets, head and body. Nagle's algorithm would delay the second."""
    with (
        listen(host, 0) as listening,
        socket.create_connection(listening.getsockname()[:2]),
        listening.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_port_in_use_is_a_settings_error() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"UNET_PORT={port}: Address already in use"):
            listen("127.0.0.1", port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ipv6_any_address_accepts_both_families() -> None:
    with listen("::", 0) as listening:
        port = listening.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port), 5), listening.accept()[0]:
                pass


@pytest.mark.skipif(sys.platform != "linux", reason="socket filters of Linux")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_rejecting_connections_keeps_those_that_wait_to_be_accepted(host: str) -> None:
    with listen(host, 0) as listening:
        address = listening.getsockname()[:2]
        with socket.create_connection(address, 5) as waiting:
            reject_new_connections(listening)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, 0.3)
            with listening.accept()[0] as accepted:
                waiting.sendall(b"hello")
                assert accepted.recv(5) == b"hello"


def test_url_of_an_ipv6_address_has_brackets() -> None:
    assert format_url("::", 8000) == "http://[::]:8000"
    assert format_url("127.0.0.1", 80) == "http://127.0.0.1:80"
