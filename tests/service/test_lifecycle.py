"""Start, probes, settings, keys and the end, with a real process."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from model.checkpoint import update_manifest
from tests.conftest import ROOT, Post, Server, encode, nuclei, serving

PROBES = ("/livez", "/readyz", "/startupz", "/healthz", "/v2/health/live", "/v2/health/ready")
IMAGE = encode(nuclei(512, 512)[0])


def test_probes_of_a_ready_service(server: Server) -> None:
    for probe in PROBES:
        assert httpx.get(server.url + probe).status_code == 200, probe


def test_probes_while_starting() -> None:
    with serving(ready=False) as starting:
        assert httpx.get(f"{starting.url}/livez").status_code == 200
        first = httpx.get(f"{starting.url}/readyz")
        if first.status_code == 503:  # it may have been quicker than we are
            assert "loading" in first.json()["cause"]
            assert httpx.post(f"{starting.url}/segment", content=IMAGE).status_code == 503
        starting.wait_ready()
        assert httpx.get(f"{starting.url}/startupz").status_code == 200


def test_models_tell_what_is_served(server: Server) -> None:
    listing = httpx.get(f"{server.url}/models").json()
    (default,) = (each for each in listing["models"] if each["name"] == listing["default"])
    assert default == httpx.get(f"{server.url}/models/{listing['default']}").json()
    assert default["ready"]
    assert default["architecture"]["in_channels"] == 3
    assert default["golden_iou"] >= 0.98
    assert default["id"].endswith(default["sha256"][:12])
    assert "auto" not in (default["device"], default["engine"], default["precision"])
    assert default["metrics"]["dice"] > 0.8
    assert len(default["revision"].rstrip("+")) == 12


def test_documentation_lists_the_route(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "multipart/form-data" in document["paths"]["/segment"]["post"]["requestBody"]["content"]
    assert {"401", "413", "429", "504"} <= set(document["paths"]["/segment"]["post"]["responses"])
    assert "Problem" in document["components"]["schemas"]
    assert "ValidationError" not in str(document)  # errors are problem documents, all of them
    for path in PROBES:
        assert set(document["paths"][path]["get"]["responses"]) == {"200", "503"}, path
    for path in ("/v2/models/{name}", "/v2/models/{name}/ready"):
        responses = document["paths"][path]["get"]["responses"]
        assert set(responses) == {"200", "401", "404", "503"}, path
    for path in ("/segment", "/v2/models/{name}/infer"):
        asked = {each["name"] for each in document["paths"][path]["post"]["parameters"]}
        assert "X-Request-Timeout" in asked, path


def test_documentation_needs_no_other_host(server: Server) -> None:
    page = httpx.get(f"{server.url}/docs")
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("<!doctype", "")
    assert httpx.get(f"{server.url}/redoc").status_code == 404


def test_metrics_agree_with_what_was_asked() -> None:
    with serving() as own:
        statuses = [
            httpx.post(f"{own.url}/segment", content=body, headers={"Content-Type": "image/png"})
            for body in (IMAGE, IMAGE, b"nonsense")
        ]
        assert [each.status_code for each in statuses] == [200, 200, 422]
        assert own.metric("unet_requests_total", route="/segment", status="200") == 2
        assert own.metric("unet_requests_total", route="/segment", status="422") == 1
        assert own.metric("unet_images_total", model="nuclei") == 2
        assert own.metric("unet_stage_seconds_count", stage="infer") == 2
        assert own.metric("unet_windows_waiting") == 0
        assert own.metric("process_resident_memory_bytes") > 1e7


def test_api_keys() -> None:
    with serving(UNET_API_KEYS="one,two") as closed:
        url = f"{closed.url}/segment"
        body = {"content": IMAGE}
        assert httpx.post(url, **body).status_code == 401
        wrong = httpx.post(url, **body, headers={"X-API-Key": "three"})
        assert wrong.status_code == 401
        assert wrong.headers["content-type"] == "application/problem+json"
        kind = {"Content-Type": "image/png"}
        for header in ({"X-API-Key": "two"}, {"Authorization": "Bearer one"}):
            assert httpx.post(url, **body, headers=header | kind).status_code == 200
        gateway = {"Authorization": "Bearer of-the-gateway", "X-API-Key": "two"}
        swapped = {"Authorization": "Bearer two", "X-API-Key": "of-the-gateway"}
        neither = gateway | {"X-API-Key": "three"}
        for headers, status in ((gateway, 200), (swapped, 200), (neither, 401)):
            assert httpx.get(f"{closed.url}/models", headers=headers).status_code == status
        for told in ("/models", "/models/nuclei", "/metrics"):
            assert httpx.get(closed.url + told).status_code == 401
            assert httpx.get(closed.url + told, headers={"X-API-Key": "two"}).status_code == 200
        for open_to_all in (*PROBES, "/", "/docs", "/openapi.json"):
            assert httpx.get(closed.url + open_to_all).status_code == 200
        described = httpx.get(closed.url + "/openapi.json").json()
        schemes = described["components"]["securitySchemes"]
        assert {each["type"] for each in schemes.values()} == {"http", "apiKey"}
        for path, operations in described["paths"].items():
            asked = any(
                {name for way in each.get("security", ()) for name in way} == set(schemes)
                for each in operations.values()
            )
            assert asked == (path not in PROBES), path


def test_where_no_keys_are_set_the_description_asks_for_none(server: Server) -> None:
    described = httpx.get(server.url + "/openapi.json").json()
    assert "securitySchemes" not in described["components"]
    assert "security" not in described["paths"]["/segment"]["post"]


def test_sigterm_answers_what_was_accepted_and_exits() -> None:
    with serving() as ending:
        answers: list[int] = []

        def send() -> None:
            response = httpx.post(
                f"{ending.url}/segment",
                content=IMAGE,
                headers={"Content-Type": "image/png"},
                timeout=60,
            )
            answers.append(response.status_code)

        clients = [threading.Thread(target=send) for _ in range(4)]
        for client in clients:
            client.start()
        while ending.metric("unet_windows_reserved") < 4:
            time.sleep(0.01)
        ending.process.send_signal(signal.SIGTERM)
        probe = httpx.get(f"{ending.url}/readyz")
        assert probe.status_code == 503
        assert "draining" in probe.json()["cause"]
        assert httpx.get(f"{ending.url}/livez").status_code == 200
        for client in clients:
            client.join()
        assert answers == [200] * 4
        assert ending.stop(seconds=10) == -signal.SIGTERM


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("UNET_PORT", "http", "integer"),
        ("UNET_DEVICE", "tpu", "cuda:N"),
        ("UNET_ENGINE", "onnx", "openvino"),
        ("UNET_PRECISION", "int4", "int8"),
        ("UNET_MAX_BATCH", "0", "1"),
        ("UNET_WEIGHTS_DIR", "/no/such/folder", "folder"),
        ("UNET_MODEL", "unknown", "nuclei"),
        ("UNET_RELOAD", "perhaps", "bool"),
        ("UNET_REQUEST_TIMEOUT_S", "nan", "finite"),
        ("UNET_MAX_UPLOAD_MB", "inf", "finite"),
        ("UNET_MAX_MEGAPIXELS", "-1", "greater"),
        ("UNET_API_KEYS", ", ,", "commas"),
        ("UNET_HOST", "no.such.host.invalid", "UNET_HOST"),
        ("UNET_HOST", "300.1.1.1", "address of this machine"),
        ("UNET_HOST", "192.0.2.1", "address of this machine"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line(name: str, value: str, allowed: str) -> None:
    result = (
        run("serve", "--port", "0", **{name: value})
        if name != "UNET_PORT"
        else run("serve", UNET_PORT=value)
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert name in line
    assert value in line
    assert allowed in line


def test_a_default_that_is_wrong_here_is_shown_as_it_would_be_written(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "UNET_WEIGHTS_DIR='weights': " in result.stderr


def test_a_flag_that_is_no_setting_is_named_as_it_was_given() -> None:
    weights = "weights/nuclei.safetensors"
    flags = ("--engine", "openvino", "--precision", "fp16", "--config", "none.toml")
    result = run("evaluate", weights, *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "--precision fp16 is not to be had with openvino" in line
    assert "UNET_" not in line


def test_no_silent_fall_back_from_cuda() -> None:
    pytest.importorskip("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    result = run("serve", "--port", "0", UNET_DEVICE="cuda")
    assert result.returncode == 2
    assert "UNET_DEVICE=cuda: " in result.stderr
    assert "CUDA" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_damaged_weights_are_never_served(tmp_path: Path) -> None:
    damaged = tmp_path / "nuclei.safetensors"
    content = bytearray((ROOT / "weights" / "nuclei.safetensors").read_bytes())
    content[-1000] ^= 0xFF
    damaged.write_bytes(content)
    result = run("serve", "--port", "0", UNET_WEIGHTS_DIR=str(tmp_path), UNET_LOG_FORMAT="text")
    assert result.returncode == 1
    assert "nuclei.safetensors is damaged" in result.stderr


def test_a_checkpoint_that_misses_its_golden_mask_is_never_served(tmp_path: Path) -> None:
    import dataclasses

    from model.checkpoint import Golden, load_checkpoint, save_checkpoint

    good = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    liar = dataclasses.replace(good, golden=Golden(good.golden.image, 255 - good.golden.mask))
    save_checkpoint(tmp_path / "nuclei.safetensors", liar)
    update_manifest(tmp_path / "nuclei.safetensors")
    result = run("serve", "--port", "0", UNET_WEIGHTS_DIR=str(tmp_path), UNET_LOG_FORMAT="text")
    assert result.returncode == 1
    assert "golden mask" in result.stderr


def test_command_line_segments_a_folder(tmp_path: Path, post: Post) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for seed in range(3):
        (source / f"{seed}.png").write_bytes(encode(nuclei(80, 90, seed)[0]))
    (source / "bad.png").write_bytes(b"not an image")
    shutil.copy(source / "0.png", source / "other.png")
    result = run("segment", str(source), "-o", str(tmp_path / "out"))
    assert result.returncode == 1
    assert "bad.png" in result.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["0.png", "1.png", "2.png", "other.png"]
    assert (tmp_path / "out/0.png").read_bytes() == (tmp_path / "out/other.png").read_bytes()
    for name in ("0.png", "1.png", "2.png"):
        assert (tmp_path / "out" / name).read_bytes() == post((source / name).read_bytes()).content


def test_command_line_mirrors_folders_and_never_replaces_an_image(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.png", "b/a.png", ".cache/c.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(encode(nuclei(80, 90, len(name))[0]))
    before = (source / "a.png").read_bytes()
    for out in (source, source / "b"):  # the second: b/a.png is no image then, but where a.png goes
        result = run("segment", str(source), str(source / "b"), "-o", str(out))
        assert result.returncode == 2
        assert "would replace the image" in result.stderr or "would both become" in result.stderr
    assert (source / "a.png").read_bytes() == before
    masks = source / "masks"
    for _ in range(2):  # the masks of the first are no images of the second
        assert run("segment", str(source), "-o", str(masks)).returncode == 0
        written = sorted(str(path.relative_to(masks)) for path in masks.rglob("*.png"))
        assert written == ["a.png", "b/a.png"]


@pytest.mark.parametrize(
    "command",
    [
        ("import", "--help"),
        ("train", "x.toml"),
        ("evaluate", "weights/person.safetensors"),
    ],
)
def test_a_command_that_needs_torch_says_so_without_it(command: tuple[str, ...]) -> None:
    hidden = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {command!r}; "
    result = subprocess.run(
        [sys.executable, "-c", hidden + "from app.cli import main; sys.exit(main())"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"{command[0]} needs torch, which is not installed" in line


def test_commands_explain_mistakes_in_one_line() -> None:
    image = str(ROOT / "app/static/samples/fluorescence.png")
    for arguments, word in (
        (["segment", "/no/such.png"], "/no/such.png"),
        (["segment", image, "--threshold", "half"], "0..1"),
        (["segment", image, "--output", "hologram"], "polygons"),
        (["segment", image, "--model", "nobody"], "nuclei"),
        (["models", "/no/such"], "/no/such"),
        (["serve", "--nonsense", "1"], "--nonsense"),
        (["serve", "--port"], "--port"),
        (["evaluate", "no.safetensors"], "no.safetensors"),
        (["segmnt"], "segment"),
        ([], "COMMAND"),
    ):
        result = run(*arguments)
        assert result.returncode == 2, arguments
        (line,) = result.stderr.splitlines()
        assert word in line
        assert "Traceback" not in line


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--port", port)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert port in line
    assert "in use" in line


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_starting_ends_the_process_at_once(sig: signal.Signals) -> None:
    """It does not wait for the models it will never serve."""
    with serving(ready=False) as starting:
        probe = httpx.get(f"{starting.url}/readyz")
        if probe.status_code == 200:
            pytest.skip("it was quicker than we are")
        started = time.monotonic()
        assert starting.stop(sig, seconds=20) in (-sig, 130)
        assert time.monotonic() - started < 3
