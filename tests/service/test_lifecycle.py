"""Start, probes, documentation, settings, keys, drain and exit of a real process."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from model.checkpoint import update_manifest
from tests.conftest import ROOT, Post, Server, encode, nuclei, serving

FAULTY = ("-m", "tools.prove.faulty")
PROBES = ("/livez", "/readyz", "/startupz", "/healthz", "/v2/health/live", "/v2/health/ready")
IMAGE = encode(nuclei(512, 512)[0])


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_probes_of_a_ready_service(server: Server) -> None:
    for probe in PROBES:
        assert httpx.get(server.url + probe).status_code == 200, probe


def test_probes_while_starting() -> None:
    with serving(ready=False) as starting:
        assert httpx.get(f"{starting.url}/livez").status_code == 200
        segment = httpx.post(f"{starting.url}/segment", content=IMAGE)
        probe = httpx.get(f"{starting.url}/readyz")
        if probe.status_code == 503:  # so it was starting all the time
            assert "loading" in probe.json()["cause"]
            assert segment.status_code == 503
        starting.wait_ready()
        assert httpx.get(f"{starting.url}/startupz").status_code == 200


def test_models_describe_what_is_served(server: Server) -> None:
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


def test_openapi_documents_routes_and_errors(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "multipart/form-data" in document["paths"]["/segment"]["post"]["requestBody"]["content"]
    assert {"401", "413", "429", "504"} <= set(document["paths"]["/segment"]["post"]["responses"])
    assert "Problem" in document["components"]["schemas"]
    assert "ValidationError" not in str(document)  # every error is a problem document
    for path in PROBES:
        assert set(document["paths"][path]["get"]["responses"]) == {"200", "503"}, path
        assert document["paths"][path]["get"]["responses"]["200"]["description"] == "Healthy"
    model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    for path in (model, version, f"{model}/ready", f"{version}/ready"):
        responses = document["paths"][path]["get"]["responses"]
        assert set(responses) == {"200", "401", "404", "503", "default"}, path
    for path in ("/segment", f"{model}/infer", f"{version}/infer"):
        parameters = {each["name"] for each in document["paths"][path]["post"]["parameters"]}
        assert "X-Request-Timeout" in parameters, path
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status not in ("200", "503"):
                    (media_type,) = response["content"]
                    assert media_type == "application/problem+json", path


def test_docs_page_loads_nothing_from_other_hosts(server: Server) -> None:
    page = httpx.get(f"{server.url}/docs")
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("<!doctype", "")
    assert httpx.get(f"{server.url}/redoc").status_code == 404


def test_metrics_count_requests_and_images() -> None:
    with serving() as own:
        statuses = [
            httpx.post(f"{own.url}/segment", content=body, headers={"Content-Type": "image/png"})
            for body in (IMAGE, IMAGE, b"nonsense")
        ]
        assert [each.status_code for each in statuses] == [200, 200, 422]
        assert own.metric("unet_requests_total", route="/segment", status="200") == 2
        assert own.metric("unet_requests_total", route="/segment", status="422") == 1
        seconds = "unet_request_seconds_count"
        assert own.metric(seconds, route="/segment", status="2xx") == 2
        assert own.metric(seconds, route="/segment", status="4xx") == 1
        assert own.metric("unet_images_total", model="nuclei") == 2
        assert own.metric("unet_stage_seconds_count", stage="infer") == 2
        assert own.metric("unet_windows_waiting") == 0
        assert own.metric("process_resident_memory_bytes") > 1e7
        models = f"{own.url}/models"
        wait_until(lambda: all(each["ready"] for each in httpx.get(models).json()["models"]))
        for result in ("accepted", "rejected"):  # loading at the start is not a reload
            assert own.metric("unet_reloads_total", result=result) == 0


def test_api_keys_are_required_except_for_probes_and_pages() -> None:
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
        for path in ("/models", "/models/nuclei", "/metrics"):
            assert httpx.get(closed.url + path).status_code == 401
            assert httpx.get(closed.url + path, headers={"X-API-Key": "two"}).status_code == 200
        for path in (*PROBES, "/", "/docs", "/openapi.json"):
            assert httpx.get(closed.url + path).status_code == 200
        document = httpx.get(closed.url + "/openapi.json").json()
        schemes = document["components"]["securitySchemes"]
        assert {each["type"] for each in schemes.values()} == {"http", "apiKey"}
        for path, operations in document["paths"].items():
            secured = any(
                {name for way in each.get("security", ()) for name in way} == set(schemes)
                for each in operations.values()
            )
            assert secured == (path not in PROBES), path


def test_replaced_key_file_is_used_without_a_restart(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old")
    settings = {"UNET_API_KEYS_FILE": str(file), "UNET_ALLOWED_HOSTS": "127.0.0.1"}
    with serving(UNET_WEIGHTS_DIR=str(tiny), **settings) as closed:
        url = f"{closed.url}/models"

        def status(key: str, **headers: str) -> int:
            return httpx.get(url, headers={"X-API-Key": key, **headers}).status_code

        assert (status("old"), status("new")) == (200, 401)
        assert status("old", Host="evil.example") == 421
        (tmp_path / "next").write_text("new")
        (tmp_path / "next").replace(file)
        wait_until(lambda: status("new") == 200)
        assert status("old") == 401


def test_openapi_without_keys_has_no_security(server: Server) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    assert "securitySchemes" not in document["components"]
    assert "security" not in document["paths"]["/segment"]["post"]


def test_sigterm_answers_accepted_requests_and_exits(tiny: Path) -> None:
    """The engine is slow, so that the requests are still computed after the signal."""
    image = encode(nuclei(600, 600)[0])
    headers = {"Content-Type": "image/png"}
    with (
        serving(program=FAULTY, FAULT="slow", UNET_WEIGHTS_DIR=str(tiny)) as ending,
        ThreadPoolExecutor(4) as clients,
    ):
        url = f"{ending.url}/segment"
        accepted = [
            clients.submit(httpx.post, url, content=image, headers=headers, timeout=60)
            for _ in range(4)
        ]
        wait_until(lambda: ending.metric("unet_held_pixels") == 4 * 600 * 600)
        ending.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{ending.url}/readyz").status_code == 503)
        assert "draining" in httpx.get(f"{ending.url}/readyz").json()["cause"]
        assert httpx.get(f"{ending.url}/livez").status_code == 200
        assert [each.result().status_code for each in accepted] == [200] * 4
        assert ending.stop(seconds=20) == -signal.SIGTERM


def test_ipv6_any_address_serves_both_families(tiny: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with serving("--host", "::", UNET_WEIGHTS_DIR=str(tiny)) as server:
        port = server.url.rpartition(":")[2]
        assert server.url == f"http://[::]:{port}"
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/livez", trust_env=False).status_code == 200


def test_keep_alive_is_a_setting(tiny: Path) -> None:
    with serving("--keep-alive-s", "1", UNET_WEIGHTS_DIR=str(tiny)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b"".join(iter(lambda: connection.recv(65536), b""))  # until it is closed
        assert received.startswith(b"HTTP/1.1 200 ")


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
def test_invalid_setting_aborts_startup_with_one_line(name: str, value: str, allowed: str) -> None:
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


def test_invalid_default_is_shown_as_it_would_be_set(tmp_path: Path) -> None:
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


def test_unavailable_engine_error_names_the_flag() -> None:
    weights = "weights/nuclei.safetensors"
    flags = ("--engine", "openvino", "--precision", "fp16", "--config", "none.toml")
    result = run("evaluate", weights, *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "--precision fp16" in line
    assert "openvino" in line
    assert "UNET_" not in line


def test_cuda_without_a_device_aborts_startup() -> None:
    pytest.importorskip("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    result = run("serve", "--port", "0", UNET_DEVICE="cuda")
    assert result.returncode == 2
    assert "UNET_DEVICE=cuda: " in result.stderr
    assert "CUDA" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_damaged_weights_are_not_served(tmp_path: Path) -> None:
    damaged = tmp_path / "nuclei.safetensors"
    content = bytearray((ROOT / "weights" / "nuclei.safetensors").read_bytes())
    content[-1000] ^= 0xFF
    damaged.write_bytes(content)
    result = run("serve", "--port", "0", UNET_WEIGHTS_DIR=str(tmp_path), UNET_LOG_FORMAT="text")
    assert result.returncode == 1
    assert "nuclei.safetensors is damaged" in result.stderr


def test_checkpoint_with_a_golden_mask_mismatch_is_not_served(tmp_path: Path) -> None:
    import dataclasses

    from model.checkpoint import Golden, load_checkpoint, save_checkpoint

    good = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    wrong = dataclasses.replace(good, golden=Golden(good.golden.image, 255 - good.golden.mask))
    save_checkpoint(tmp_path / "nuclei.safetensors", wrong)
    update_manifest(tmp_path / "nuclei.safetensors")
    result = run("serve", "--port", "0", UNET_WEIGHTS_DIR=str(tmp_path), UNET_LOG_FORMAT="text")
    assert result.returncode == 1
    assert "golden mask" in result.stderr


def test_segment_command_writes_the_masks_of_the_service(tmp_path: Path, post: Post) -> None:
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


def test_segment_command_mirrors_folders_and_never_overwrites_an_image(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.png", "b/a.png", ".cache/c.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(encode(nuclei(80, 90, len(name))[0]))
    before = (source / "a.png").read_bytes()
    for out in (source, source / "b"):  # second: a.png would be written to b/a.png
        result = run("segment", str(source), str(source / "b"), "-o", str(out))
        assert result.returncode == 2
        assert "would replace the image" in result.stderr or "would both become" in result.stderr
    assert (source / "a.png").read_bytes() == before
    masks = source / "masks"
    for _ in range(2):  # the second run does not segment the masks of the first
        assert run("segment", str(source), "-o", str(masks)).returncode == 0
        written = sorted(str(path.relative_to(masks)) for path in masks.rglob("*.png"))
        assert written == ["a.png", "b/a.png"]


@pytest.mark.parametrize(
    "command",
    [
        ("import", "weights/person.safetensors", "--name", "other"),
        ("train", "x.toml"),
        ("evaluate", "weights/person.safetensors"),
    ],
)
def test_command_that_needs_torch_says_so_in_one_line(command: tuple[str, ...]) -> None:
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


def test_user_mistake_is_one_line() -> None:
    image = str(ROOT / "app/static/samples/fluorescence.png")
    for arguments, word in (
        (["segment", "/no/such.png"], "/no/such.png"),
        (["segment", image, "--threshold", "half"], "0..1"),
        (["segment", image, "--output", "hologram"], "polygons"),
        (["segment", image, "--model", "no-such-model"], "nuclei"),
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


def test_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--port", port)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert port in line
    assert "in use" in line


@pytest.mark.parametrize("module", ["argparse", "fastapi", "openvino"])
def test_interrupt_during_an_import_shows_no_traceback(module: str) -> None:
    program = f"""
import os, signal, sys
class Interrupter:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
from app.__main__ import main
sys.modules.pop("argparse", None)
sys.meta_path.insert(0, Interrupter())
sys.argv[1:] = ["serve", "--port", "0"]
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode in (-signal.SIGINT, 130)
    assert result.stderr == ""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_loading_exits_without_waiting(sig: signal.Signals, tiny: Path) -> None:
    """Loading never ends here: the process must not wait for it."""
    with serving(program=FAULTY, FAULT="load", UNET_WEIGHTS_DIR=str(tiny), ready=False) as starting:
        assert httpx.get(f"{starting.url}/readyz").status_code == 503
        assert starting.stop(sig, seconds=20) in (-sig, 130)
