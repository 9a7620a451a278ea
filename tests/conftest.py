"""Shared fixtures: a service in its own process on a free port, and synthetic images."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.drawing import drawn_weights as drawn_weights
from tests.drawing import nuclei as nuclei

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
START_SECONDS = 120
"""Time for a start, which takes seconds where nothing else uses the machine."""


@dataclasses.dataclass
class Server:
    """A running `unet serve`."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    def wait_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError("not ready:\n" + "\n".join(self.lines))

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics; 0 if it is missing."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if match and wanted <= set((match[1] or "").split(",")):
                return float(match[2])
        return 0.0

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(seconds)


@contextlib.contextmanager
def serving(
    *flags: str, ready: bool = True, program: Sequence[str] = ("-m", "app.cli"), **environment: str
) -> Iterator[Server]:
    """Start the service on a free port, and kill it at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *program, "serve", "--port", "0", *flags],
        cwd=ROOT,
        env={**os.environ, "UNET_LOG_FORMAT": "text", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    listening = threading.Event()
    server = Server("", process, lines)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if match := re.search(r"listening on (http://\S+:\d+)", line):
                server.url = match[1]
                listening.set()
        listening.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listening.wait(START_SECONDS), "the service does not listen"
        if ready:
            server.wait_ready()
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One service with the shipped weights, shared by all tests that do not change its state."""
    with serving() as running:
        yield running


def encode(array: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def tiff(
    values: np.ndarray,
    photometric: int = 1,
    *,
    order: Literal["<", ">"] = "<",
    planes: bool = False,
    compression: str | None = None,
    extra: tuple[int, ...] = (),
    big: bool = False,
    rows: int | None = None,
    **tags: int,
) -> bytes:
    """Write a TIFF, also one that is unusual or wrong.

    Args:
        values: (H, W) or (H, W, C) of any type of number.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK.
        order: "<" little-endian, ">" big-endian.
        planes: whether the channels are stored one after the other.
        compression: as `tifffile.imwrite` takes it.
        extra: ExtraSamples, what the channels beyond the colors are.
        big: BigTIFF.
        rows: of a strip.
        tags: values to put into tags that have only one, as `t259=34712`.
    """
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        np.moveaxis(values, 2, 0) if planes else values,
        photometric=photometric,
        planarconfig=None if values.ndim == 2 else 2 if planes else 1,
        byteorder=order,
        compression=compression,
        extrasamples=extra or None,
        bigtiff=big,
        rowsperstrip=rows,
        metadata=None,
    )
    data = buffer.getvalue()
    for name, value in tags.items():
        data = set_tag(data, int(name[1:]), value)
    return data


def set_tag(data: bytes, code: int, value: int) -> bytes:
    """Overwrite a tag in the first directory of a TIFF."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages.first.tags[code]
        order: Literal["little", "big"] = "little" if file.byteorder == "<" else "big"
    stop = tag.valueoffset + tag.valuebytecount
    return data[: tag.valueoffset] + value.to_bytes(tag.valuebytecount, order) + data[stop:]


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def decode_tensors(body: bytes, length: int | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parse a response of /v2 as a client does: the JSON document, and the tensors by name.

    Args:
        length: bytes of the JSON where binary data follow it.
    """
    document = json.loads(body if length is None else body[:length])
    rest, found = b"" if length is None else body[length:], {}
    for output in document["outputs"]:
        kind = {"UINT8": np.uint8, "FP32": "<f4"}[output["datatype"]]
        if size := output.get("parameters", {}).get("binary_data_size"):
            assert "data" not in output
            values, rest = np.frombuffer(rest[:size], kind), rest[size:]
        else:
            values = np.array(output["data"], kind)
        found[output["name"]] = values.reshape(output["shape"])
    assert not rest
    return document, found


Post = Callable[..., httpx.Response]


@pytest.fixture
def post(server: Server) -> Post:
    """POST /segment to the shared service: post(bytes, **query)."""

    def send(
        data: bytes, *, headers: dict[str, str] | None = None, **query: object
    ) -> httpx.Response:
        return httpx.post(
            f"{server.url}/segment",
            content=data,
            params=query,  # type: ignore[arg-type]
            headers={"Content-Type": "application/octet-stream", **(headers or {})},
            timeout=60,
        )

    return send


def write_tiny(path: Path, seed: int = 0, classes: int = 1, resize: bool = False) -> str:
    """Write a small untrained checkpoint, its golden pair and its manifest entry; return its id.

    Windows are 64×64 and 128×128 (64×48 in mode "resize"). A service with it segments hundreds of
    images per second.
    """
    from model.checkpoint import Checkpoint, save_checkpoint, update_manifest
    from model.config import PreprocessConfig, UNetConfig
    from model.predict import attach_golden

    architecture = UNetConfig(3, classes, 4, 1)
    several = {
        "classes": tuple(["background", "cell", "debris"][:classes]),
        "palette": ((0, 0, 0), (255, 0, 0), (0, 255, 0))[:classes],
    }
    whole = {"mode": "resize", "window": ((64, 48),), "overlap": 0}
    cut = {"window": ((64, 64), (128, 128)), "overlap": 32}
    preprocess = PreprocessConfig(**(whole if resize else cut), **(several if classes > 1 else {}))
    draft = Checkpoint(path.stem, architecture, preprocess, drawn_weights(architecture, seed))
    saved = save_checkpoint(path, attach_golden(draft, nuclei(100, 100, seed)[0]))
    update_manifest(path)
    return saved.id


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder that holds only the small checkpoint, named like the default model."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder / "nuclei.safetensors")
    return folder
