"""Chooses the proxy for a service from the environment.

httpx would read the environment itself, but fails at construction if one variable is wrong, and
sends requests for loopback addresses through the proxy unless NO_PROXY lists them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import os
import urllib.request

import httpx

_SCHEMES = ("http", "https", "socks5", "socks5h")


@dataclasses.dataclass(frozen=True)
class ProxyChoice:
    """How to reach a service.

    Attributes:
        proxy: the proxy to use; None connects directly.
        source: the environment variable that names the proxy; empty without a proxy.
        error: why the proxy cannot be used; empty if it can.
    """

    proxy: httpx.Proxy | None = None
    source: str = ""
    error: str = ""


def choose_proxy(url: httpx.URL) -> ProxyChoice:
    """Choose the proxy for `url` from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

    Loopback addresses are always reached directly.
    """
    if _is_loopback(url.host) or urllib.request.proxy_bypass(url.netloc.decode()):
        return ProxyChoice()
    proxies = urllib.request.getproxies()
    for scheme in (url.scheme, "all"):
        if proxies.get(scheme):
            return _parse_proxy(proxies[scheme], _find_variable(scheme))
    return ProxyChoice()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _find_variable(scheme: str) -> str:
    for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY"):
        if os.environ.get(name):
            return name
    return "the proxy in the system settings"  # of Windows or macOS


def _parse_proxy(value: str, source: str) -> ProxyChoice:
    """Errors do not repeat the value, which may contain a password."""
    if "://" not in value:
        value = f"http://{value}"
    scheme = value.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        supported = ", ".join(_SCHEMES)
        error = f"scheme {scheme!r} is not supported; supported: {supported}"
        return ProxyChoice(source=source, error=error)
    if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        error = "SOCKS requires the package socksio: pip install 'httpx[socks]'"
        return ProxyChoice(source=source, error=error)
    try:
        proxy = httpx.Proxy(value)
    except (ValueError, httpx.InvalidURL):
        return ProxyChoice(source=source, error="not a valid URL")
    if not proxy.url.host:
        return ProxyChoice(source=source, error="the URL has no host")
    return ProxyChoice(proxy, source)
