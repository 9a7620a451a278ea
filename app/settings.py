"""The settings of the service: environment variables with the prefix UNET_.

Each setting is also a flag of `unet serve`, and a flag overrides the variable.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import SettingsError
from model.checkpoint import SUFFIX
from model.config_base import requirement, suggest

log = logging.getLogger(__name__)

PREFIX = "UNET_"
KEY_VARIABLE = f"{PREFIX}KEY"
"""The API key that a command sends to a running service. Not a setting of the service."""

KEY_PATTERN = re.compile(r"[!-~]+")
"""An API key: characters that a header carries unchanged (VCHAR of RFC 9110, section 5.5). The
Python client and the web page have the same rule."""
KEY_RULE = "visible ASCII characters without spaces"
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?")
"""An origin as browsers serialize it (RFC 6454, section 6.2), or any origin."""
_HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")
"""A host as in a URL, or all names of a domain."""
_DEFAULT_PORT = re.compile(r"http://.*:80|https://.*:443")

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
"""The value that Kubernetes gives to NAME_PORT for a Service called NAME."""
_SERVICE_LINK_NAME = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT_\d+_(TCP|UDP|SCTP)(_|$)")

_AutoInt = Annotated[int | None, Field(ge=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Every setting with its default and its description."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")

    weights_dir: Path = Field(Path("weights"), description="folder of the checkpoints")
    model: str = Field(
        "nuclei",
        description="name of the default model; unless it is set, a folder with a single "
        "checkpoint serves that one",
    )
    reload: bool = Field(False, description="load new and changed checkpoints while serving")

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or cuda:N,cuda:M")
    engine: Literal["auto", "torch", "openvino"] = Field("auto", description="inference backend")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="numeric precision"
    )
    threads: _AutoInt = Field(
        None, description="CPU threads of the engine; auto: the container's CPU quota"
    )

    image_workers: _AutoInt = Field(
        None, description="processes that decode and encode images; auto: one per CPU of the quota"
    )

    max_batch: _AutoInt = Field(None, description="windows per batch; auto: 1 on a CPU, 8 on CUDA")
    max_wait_ms: _Number = Field(
        0, ge=0, le=10_000, description="how long a batch that is not full waits, in ms"
    )
    queue_windows: _AutoInt = Field(
        None,
        description="limit on queued windows; auto: what the device can compute within the longest "
        "deadline, as measured",
    )
    queue_megapixels: _Number = Field(
        400, gt=0, description="limit on decoded images in memory, in 10^6 pixels"
    )
    queue_mb: _Number = Field(
        512, gt=0, description="limit on buffered uploads and responses, in 10^6 bytes"
    )
    request_timeout_s: _Number = Field(
        60, gt=0, le=86_400, description="deadline of a request that asks for none, in seconds"
    )
    max_request_timeout_s: _Number = Field(
        600, gt=0, le=86_400, description="longest deadline that a request may ask for, in seconds"
    )
    keep_alive_s: int = Field(
        75, ge=1, description="idle time after which a connection is closed, in seconds"
    )
    watchdog_s: _Number = Field(
        60, gt=0, description="a batch that runs longer counts as hung, in seconds"
    )
    drain_s: _Number = Field(20, ge=0, description="drain timeout at shutdown, in seconds")
    exit_on_engine_failure: bool = Field(
        False, description="exit when the engine hangs or its device is lost"
    )

    max_upload_mb: _Number = Field(128, gt=0, description="largest request body, in 10^6 bytes")
    max_megapixels: _Number = Field(100, gt=0, description="largest image, in 10^6 pixels")
    api_keys: _Names = Field((), description="comma-separated API keys; none: no authentication")
    api_keys_file: Path | None = Field(
        None, description="file with one API key per line, read again when it changes"
    )
    allowed_hosts: _Names = Field(
        (), description="comma-separated host names that requests may ask for; none: any"
    )
    cors_origins: _Names = Field(
        (), description="comma-separated origins whose pages may call the service"
    )

    log_format: Literal["json", "text"] = Field("json", description="format of the log")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level that is logged"
    )

    @field_validator("threads", "image_workers", "max_batch", "queue_windows", mode="before")
    @classmethod
    def _read_auto(cls, value: Any) -> Any:
        return None if value in ("auto", "") else value

    @property
    def longest_timeout_s(self) -> float:
        """Seconds of the longest deadline. A default deadline that is longer raises a limit that
        was not set."""
        longest = self.max_request_timeout_s
        if "max_request_timeout_s" in self.model_fields_set:
            return longest
        return max(longest, self.request_timeout_s)

    @property
    def default_timeout_s(self) -> float:
        """Seconds of the deadline of a request that asks for none."""
        return min(self.request_timeout_s, self.longest_timeout_s)

    @property
    def requires_keys(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @field_validator("api_keys", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(item.strip() for item in value.split(",") if item.strip())
        if value and not names:  # an empty secret must not switch authentication off
            raise ValueError("must be values separated by commas; leave it unset for none")
        return names

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(KEY_PATTERN.fullmatch, value)):
            raise ValueError(f"each key must be {KEY_RULE}")
        return value

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _check_key_file(cls, value: Any) -> Any:
        if value == "":  # an empty variable must not switch authentication off
            raise ValueError("must be the path of a file; leave it unset for none")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"{host} is not a host; allowed: a name or an address without a port, in lower "
                    "case, or *.DOMAIN for all names of a domain"
                )
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
                raise ValueError(
                    f"{origin} is not an origin; allowed: * or scheme://host[:port] as browsers "
                    "send it, in lower case, without a slash or a path at the end, and without "
                    "port 80 for http or port 443 for https"
                )
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*", value):
            raise ValueError("must be auto, cpu, cuda, cuda:N or cuda:N,cuda:M")
        return value

    @field_validator("weights_dir")
    @classmethod
    def _check_folder(cls, value: Path) -> Path:
        try:
            is_folder = value.is_dir()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error
        if value.is_file():
            folder = value.absolute().parent
            model = f", and {PREFIX}MODEL or --model to {value.stem}"
            raise ValueError(
                f"this is a file; set {PREFIX}WEIGHTS_DIR or --weights-dir to its folder {folder}"
                + (model if value.suffix == SUFFIX else "")
            )
        if not is_folder:
            raise ValueError(
                f"folder {value.absolute()} not found; set {PREFIX}WEIGHTS_DIR or --weights-dir "
                "to the folder of the checkpoints"
            )
        return value


SECTIONS = {
    "server": ("host", "port", "keep_alive_s", "drain_s", "log_format", "log_level"),
    "models": ("weights_dir", "model", "reload"),
    "engine": (
        "device", "engine", "precision", "threads", "image_workers", "max_batch", "max_wait_ms",
        "watchdog_s", "exit_on_engine_failure",
    ),
    "limits": (
        "queue_windows", "queue_megapixels", "queue_mb", "request_timeout_s",
        "max_request_timeout_s", "max_upload_mb", "max_megapixels",
    ),
    "access": ("api_keys", "api_keys_file", "allowed_hosts", "cors_origins"),
}  # fmt: skip
"""Heading -> settings, for the help of `unet serve`. Every setting has one."""


def load_settings(**flags: str) -> Settings:
    """Load settings from the environment. Explicit flags override it.

    Unless the default model is named, the only checkpoint of the weights folder is it.

    Raises:
        SettingsError: one line about the first invalid setting: its name, its value and what is
            allowed.
    """
    try:
        return _choose_only_model(Settings(**flags))  # type: ignore[arg-type] # pydantic parses the text
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
    name = str(details["loc"][0])
    value = details["input"]
    if isinstance(value, Path):  # a default
        value = str(value)
    message = requirement(details)
    if _SERVICE_LINK.match(str(value)):
        message += (
            "; Kubernetes sets this variable for a Service named 'unet': set enableServiceLinks: "
            "false in the pod's spec, or rename the Service"
        )
    if name == "api_keys":
        value = re.sub(r"[!-+\--~]", "*", str(value))  # only what is not allowed is shown
    raise SettingsError(f"{PREFIX}{name.upper()}={value!r}: {message}")


def _choose_only_model(settings: Settings) -> Settings:
    """Set the default model to the only one of the folder, if none is named."""
    found = list(settings.weights_dir.glob(f"*{SUFFIX}"))
    if "model" in settings.model_fields_set or len(found) != 1:
        return settings
    return settings.model_copy(update={"model": found[0].stem})


def warn_about_unknown_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Log a warning for each variable with the prefix UNET_ that means nothing here.

    Variables that Kubernetes sets for a Service whose name starts with `unet` are ignored.
    """
    known = [*(name.upper() for name in Settings.model_fields), KEY_VARIABLE.removeprefix(PREFIX)]
    for variable, value in sorted(environment.items()):
        name = variable.upper()
        if not name.startswith(PREFIX) or name.removeprefix(PREFIX) in known:
            continue
        if _SERVICE_LINK_NAME.search(name) or _SERVICE_LINK.match(value):
            continue
        hint = suggest(name.removeprefix(PREFIX), known, PREFIX)
        log.warning("unknown variable %s is ignored%s", variable, hint)
