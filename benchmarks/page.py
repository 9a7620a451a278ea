"""Measure the web page in headless Chromium: `python -m benchmarks.page`.

Against a service of its own: the time from a file to its objects, the bytes that the page keeps of
them, the time to load an image that is selected, to redraw it (fitted, zooming, and at 1:1), to
show the first preview of a threshold, and to make five files without a deleted object, at 1, 12 and
20 megapixels; the longest task of the page's main thread during all of that; whether three images
of 12 and one of 20 megapixels, added together, all succeed; and the memory of the browser's
processes after 10 and after 200 images of 0.26 megapixels.

Prints a table, and JSON with --json. Needs Linux, playwright and /usr/bin/chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from app.cli.bench.serving import serving

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "app/static/samples/fluorescence.png"
SIZES = {"1": (1000, 1000), "12": (3000, 4000), "20": (3650, 5480)}
TIMEOUT_MS = 600_000

REDRAW = """async () => {
    const viewer = await import('./static/viewer.js');
    const canvas = document.getElementById('canvas');
    const time = (change) => {
        const start = performance.now();
        change();
        viewer.drawNow();
        canvas.getContext('2d').getImageData(0, 0, 1, 1);  // waits until it is drawn
        return performance.now() - start;
    };
    const median = (change) => {
        const times = Array.from({length: 15}, () => time(change)).sort((a, b) => a - b);
        return times[7];
    };
    viewer.fit();
    const fitted = median(() => {});
    const zooming = median(() => viewer.zoomBy(1.15));
    const full = median(viewer.zoomToOne);
    viewer.fit();
    return {fitted, zooming, full};
}"""
WATCH_TASKS = """
window.longTasks = [];
new PerformanceObserver((list) => longTasks.push(...list.getEntries().map((each) => each.duration)))
    .observe({type: 'longtask', buffered: true});
"""
LONGEST_TASK = """async () => {
    await new Promise((resolve) => setTimeout(resolve, 300));  // entries come after their task
    return Math.max(0, ...longTasks.splice(0));
}"""
LOAD = """async () => {
    const viewer = await import('./static/viewer.js');
    const layers = await import('./static/layers.js');
    const start = performance.now();
    layers.releaseLayers(await layers.createLayers(viewer.current()));
    return performance.now() - start;
}"""
PREVIEW = """async () => {
    const viewer = await import('./static/viewer.js');
    const start = performance.now();
    await viewer.previewThreshold(0.5);
    const taken = performance.now() - start;
    await viewer.previewThreshold(null);
    return taken;
}"""
KEPT_BYTES = """async () => {
    const {outputs} = (await import('./static/viewer.js')).current();
    return Object.values(outputs).reduce((sum, each) => sum + each.size, 0);
}"""
EDITED_KINDS = ("mask", "instances", "rois", "coco", "cutout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/nuclei.safetensors")
    parser.add_argument("--images", type=int, default=200, help="for the memory (200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    with (
        serving(args.weights) as service,
        sync_playwright() as playwright,
        tempfile.TemporaryDirectory() as folder,
    ):
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )

        def open_page() -> Page:
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.set_default_timeout(TIMEOUT_MS)
            page.add_init_script(WATCH_TASKS)
            page.goto(service.url)
            return page

        figures: dict[str, Any] = {"sizes": measure_sizes(open_page(), Path(folder))}
        figures["together"] = measure_together(open_page(), Path(folder))
        figures["memory"] = measure_memory(open_page(), args.images)
        browser.close()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure_sizes(page: Page, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds to segment, and milliseconds to load and redraw and of the longest tasks, by
    megapixels. A task below 50 ms counts as 0, because browsers do not report it."""
    figures = {}
    for place, (name, (height, width)) in enumerate(SIZES.items(), start=1):
        path = draw_image(folder / f"{name}.jpg", height, width, seed=0)
        start = time.perf_counter()
        page.evaluate(LONGEST_TASK)
        page.set_input_files("#files", path)
        page.wait_for_selector(f"#strip li:nth-child({place}) [data-state=done]")
        seconds = time.perf_counter() - start
        page.click(f"#strip li:nth-child({place}) button")
        page.wait_for_selector("#stage:not([aria-busy])")
        receiving = page.evaluate(LONGEST_TASK)
        load = page.evaluate(LOAD)
        loading = page.evaluate(LONGEST_TASK)
        redraw = page.evaluate(REDRAW)
        preview = page.evaluate(PREVIEW)
        kept = page.evaluate(KEPT_BYTES)
        page.evaluate(LONGEST_TASK)
        files, saving = measure_saving(page)
        tasks = {"receiving_ms": receiving, "loading_ms": loading, "saving_ms": saving}
        figures[name] = {"seconds": seconds, "kept_bytes": kept, "load_ms": load} | redraw | tasks
        figures[name] |= {"preview_ms": preview, "files_s": files}
        print(
            f"{name:>3} Mpx: {page.inner_text('#count')} in {seconds:.1f} s, {kept / 1e6:.1f} MB; "
            f"load {load:.0f} ms; redraw {redraw['fitted']:.1f} ms, zooming "
            f"{redraw['zooming']:.1f}, 1:1 {redraw['full']:.1f}; first preview {preview:.0f} ms; "
            f"five files {files:.1f} s; longest task: receiving {receiving:.0f} ms, loading "
            f"{loading:.0f}, saving {saving:.0f}",
            flush=True,
        )
    page.close()
    return figures


def measure_saving(page: Page) -> tuple[float, float]:
    """Seconds to make files without a deleted object, and milliseconds of the longest task."""
    page.click("#table tbody tr:first-child button")
    page.click("#object-delete")
    page.click("#choose-outputs")
    for box in page.locator("#kinds input").all():
        box.set_checked(box.get_attribute("value") in EDITED_KINDS)
    page.click("#outputs button")
    start = time.perf_counter()
    with page.expect_download(timeout=TIMEOUT_MS):
        page.click("#download")
    seconds = time.perf_counter() - start
    page.wait_for_selector("#download:enabled")
    longest: float = page.evaluate(LONGEST_TASK)
    return seconds, longest


def measure_together(page: Page, folder: Path) -> dict[str, Any]:
    """Add three images of 12 and one of 20 megapixels at once; count those that succeed."""
    paths = [draw_image(folder / f"{seed}.jpg", *SIZES["12"], seed) for seed in range(3)]
    paths.append(draw_image(folder / "3.jpg", *SIZES["20"], seed=3))
    start = time.perf_counter()
    page.set_input_files("#files", paths)
    page.wait_for_selector("#strip li:nth-child(4)")
    pending = "#strip [data-state=waiting], #strip [data-state=working]"
    expect(page.locator(pending)).to_have_count(0, timeout=TIMEOUT_MS)
    seconds = time.perf_counter() - start
    done = page.locator("#strip [data-state=done]").count()
    print(f"three of 12 and one of 20 Mpx: {done} of 4 done in {seconds:.1f} s", flush=True)
    page.close()
    return {"done": done, "seconds": seconds}


def measure_memory(page: Page, images: int) -> dict[str, float]:
    """Megabytes of the browser's processes after 10 images, and after all."""
    content = SAMPLE.read_bytes()
    figures = {}
    added = 0
    for count in (10, images):
        files = [
            {"name": f"{number}.png", "mimeType": "image/png", "buffer": content}
            for number in range(added, count)
        ]
        for batch in range(0, len(files), 50):  # playwright sends files in one message
            page.set_input_files("#files", files[batch : batch + 50])  # type: ignore[arg-type]
        added = count
        done = page.locator("#strip [data-state=done]")
        expect(done).to_have_count(count, timeout=TIMEOUT_MS)
        page.wait_for_timeout(2000)
        page.request_gc()
        figures[str(count)] = read_descendants_memory() / 1e6
        print(f"{count} images: {figures[str(count)]:.0f} MB", flush=True)
    page.close()
    return figures


def draw_image(path: Path, height: int, width: int, seed: int) -> Path:
    """Save a JPEG of the sample's nuclei, repeated, with some noise."""
    sample = np.asarray(Image.open(SAMPLE)).astype(int)
    repeats = (-(-height // sample.shape[0]), -(-width // sample.shape[1]))
    noise = np.random.default_rng(seed).integers(-2, 3, (height, width))
    pixels = (np.tile(sample, repeats)[:height, :width] + noise).clip(0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=88)
    return path


def read_descendants_memory() -> int:
    """Bytes of all Chromium processes below this one; shared pages count in proportion."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(status[1])
    family = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    total = 0
    for pid in family:
        folder = Path(f"/proc/{pid}")
        if "chromium" not in (folder / "comm").read_text() + str((folder / "exe").readlink()):
            continue
        lines = (folder / "smaps_rollup").read_text().splitlines()
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


if __name__ == "__main__":
    main()
