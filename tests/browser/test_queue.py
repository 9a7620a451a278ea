"""Retries, clearing and re-running. The tests respond in place of the service."""

from __future__ import annotations

import re

import numpy as np
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import (
    ALL_KINDS,
    advance_until,
    always_send_mask,
    canvas_pixels,
    choose_files,
    choose_outputs,
    outputs_of,
    read_table,
    save_file,
    send_mask,
    send_problem,
    settings_of,
    square_mask,
    thumbnails,
    unzip,
    wait_done,
    wait_drawn,
    wait_finished,
)
from tests.conftest import encode, nuclei

CELLS = encode(nuclei(64, 64)[0])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("unreachable", "The server cannot be reached."),
        ("502", "The server cannot be reached."),
        ("503", "The server is restarting."),
        ("504", "The server has much to do."),
        ("429", "The server is busy with other work."),
    ],
)
def test_queue_waits_as_a_whole_and_says_why(
    clocked_page: Page, expected_errors: list[str], error: str, reason: str
) -> None:
    expected_errors += ["ERR_CONNECTION_REFUSED", "503", "504", "502", "429"]
    page = clocked_page
    failing = True
    requests: list[str] = []

    def serve(route: Route) -> None:
        requests.append(route.request.url)
        if not failing:
            send_mask(route)
        elif error == "unreachable":
            route.abort("connectionrefused")
        else:
            send_problem(route, int(error), "temporary")

    page.route("**/segment*", serve)
    page.route("**/livez", lambda route: route.abort("connectionrefused"))
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(5)])
    expect(page.locator("#waiting")).to_contain_text(reason)
    assert len(requests) <= 3  # fewer if the first one failed before the others were prepared
    for _ in range(60):  # each failure doubles the pause
        before = len(requests)
        page.clock.run_for(1_000)
        page.wait_for_timeout(50)
        assert len(requests) <= before + 1  # one at a time tries again
        if len(requests) > 4:
            break
    assert len(requests) > 4
    assert page.inner_text("#status") == "0 of 5"
    failing = False
    advance_until(page, lambda: thumbnails(page, "done").count() == 5)
    assert page.inner_text("#status") == "5 done"
    assert not page.is_visible("#waiting")
    assert not page.is_visible("#retry")


def test_waiting_can_be_stopped_and_resumed(page: Page, expected_errors: list[str]) -> None:
    expected_errors += ["503"]
    failing = True

    def serve(route: Route) -> None:
        send_problem(route, 503, "draining") if failing else send_mask(route)

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", CELLS), ("b.png", CELLS))
    expect(page.locator("#waiting")).to_contain_text("restarting")
    page.click("#stop")
    assert page.inner_text("#status") == "2 stopped"
    assert page.inner_text("#waiting") == ""
    assert page.evaluate("document.activeElement.id") == "resume"
    failing = False
    page.click("#resume")
    wait_done(page, 2)
    assert not page.is_visible("#resume")


def test_image_that_misses_every_deadline_fails_in_the_end(
    clocked_page: Page, expected_errors: list[str]
) -> None:
    page = clocked_page
    expected_errors += ["504"]
    timeouts: list[str] = []

    def serve(route: Route) -> None:
        if b"late" not in (route.request.post_data_buffer or b""):
            return send_mask(route)
        timeouts.append(route.request.headers["x-request-timeout"])
        return send_problem(route, 504, "estimated 35.2 s exceeds the 30.0 s remaining")

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", CELLS + b"late"), ("b.png", CELLS))
    advance_until(page, lambda: thumbnails(page, "failed").count() > 0)
    wait_done(page)
    assert len(timeouts) == 4
    assert float(timeouts[0]) >= 600  # as long as a service may allow
    assert page.inner_text("#error") == "Too large for this server now (about 35 s, limit 30 s)."


def test_image_whose_connection_always_breaks_fails_alone(
    clocked_page: Page, expected_errors: list[str]
) -> None:
    page = clocked_page
    expected_errors += ["ERR_CONNECTION_REFUSED"]
    reachable = False

    def serve(route: Route) -> None:
        breaks = b"breaking" in (route.request.post_data_buffer or b"") and not reachable
        route.abort("connectionrefused") if breaks else send_mask(route)

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", CELLS + b"breaking"), ("b.png", CELLS))
    advance_until(page, lambda: thumbnails(page, "failed").count() > 0)
    wait_done(page)
    assert "The connection broke 3 times" in page.inner_text("#error")
    assert page.is_disabled("#download")
    reachable = True
    page.click("#retry")
    wait_done(page, 2)
    assert not page.is_visible("#retry")
    assert not page.is_visible("#error")


def test_large_images_are_sent_one_at_a_time(page: Page) -> None:
    held: list[Route] = []
    page.route("**/segment*", lambda route: held.append(route))
    large = np.zeros((2048, 2100), np.uint8)
    choose_files(page, *[(f"{n}.png", encode(large)) for n in range(3)])
    for _ in range(3):
        while not held:
            page.wait_for_timeout(20)
        page.wait_for_timeout(200)
        (route,) = held
        held.clear()
        send_mask(route, large)
    wait_done(page, 3)


def test_time_left_is_shown(page: Page) -> None:
    count = 0

    def serve(route: Route) -> None:
        nonlocal count
        count += 1
        if count <= 4:
            send_mask(route)

    page.route("**/segment*", serve)
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(12)])
    wait_done(page, 4)
    expect(page.locator("#status")).to_have_text(re.compile(r"4 of 12, about \d+ s left"))
    assert page.get_attribute("#bar", "value") == "4"


def test_one_image_can_be_removed(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(3)])
    wait_done(page, 3)
    page.click("#strip li:nth-child(2) button")
    page.click("#remove")
    assert page.locator("#strip li").count() == 2
    assert page.inner_text("#name") == "2.png"
    assert page.evaluate("document.activeElement.title") == "2.png"
    assert page.inner_text("#status") == "2 done"


WATCH_ANNOUNCEMENTS = """() => {
    window.messages = [];
    const announcer = document.getElementById('announcer');
    new MutationObserver(() => messages.push(announcer.textContent))
        .observe(announcer, {childList: true, characterData: true, subtree: true});
}"""


def test_progress_is_announced_at_start_and_end_only_when_short(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    page.evaluate(WATCH_ANNOUNCEMENTS)
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(6)])
    wait_done(page, 6)
    expect(page.locator("#announcer")).to_have_text("Finished: 6 done.")
    assert page.evaluate("messages") == ["Started: 6 to do.", "Finished: 6 done."]


def test_progress_is_announced_every_ten_seconds(clocked_page: Page) -> None:
    page = clocked_page
    held: list[Route] = []
    page.route("**/segment*", lambda route: held.append(route))
    page.evaluate(WATCH_ANNOUNCEMENTS)
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(6)])
    for done in range(1, 7):
        advance_until(page, lambda: bool(held), step_ms=10)
        send_mask(held.pop(0))
        advance_until(page, lambda n=done: thumbnails(page, "done").count() == n, step_ms=10)
        page.clock.run_for(6_000)
    messages = page.evaluate("messages")
    assert messages[0] == "Started: 6 to do."
    assert messages[-1] == "Finished: 6 done."
    between = [re.fullmatch(r"([1-5]) of 6, about \d+ s left", each) for each in messages[1:-1]]
    assert 2 <= len(between) <= 3
    assert all(between)


def test_rejected_image_is_not_retried(page: Page) -> None:
    requests: list[str] = []

    def serve(route: Route) -> None:
        requests.append(route.request.url)
        send_problem(route, 422, "not an image")

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", CELLS))
    wait_finished(page)
    assert (len(requests), page.inner_text("#error")) == (1, "Not an image")


def test_clear_removes_images_that_are_being_processed(page: Page) -> None:
    stuck: list[Route] = []

    def serve(route: Route) -> None:
        send_mask(route) if len(stuck) == 3 else stuck.append(route)

    page.route("**/segment*", serve)
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(4)])
    while len(stuck) < 3:
        page.wait_for_timeout(20)
    page.click("#clear")
    assert page.locator("#strip li").count() == 0
    assert not page.is_visible("#work")
    assert not page.is_visible("#status")
    page.wait_for_timeout(200)
    choose_files(page, ("new.png", CELLS))  # the cancelled requests no longer count as running
    wait_done(page)
    assert page.inner_text("#name") == "new.png"


def test_clear_asks_before_it_removes_masks_that_are_not_downloaded(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    choose_files(page, ("a.png", CELLS))
    wait_done(page)
    questions: list[str] = []
    page.once("dialog", lambda dialog: (questions.append(dialog.message), dialog.dismiss()))
    page.click("#clear")
    assert "not been downloaded" in questions[0]
    assert page.locator("#strip li").count() == 1
    with page.expect_download():
        page.click("#download")
    page.click("#clear")
    assert page.locator("#strip li").count() == 0


def test_leaving_asks_only_while_masks_are_not_downloaded(page: Page) -> None:
    page.route("**/segment*", always_send_mask)
    leave = """() => !dispatchEvent(new Event('beforeunload', {cancelable: true}))"""
    assert not page.evaluate(leave)
    page.click("[data-sample*=fluorescence]")  # samples do not count
    wait_done(page)
    assert not page.evaluate(leave)
    choose_files(page, ("a.png", CELLS))
    wait_done(page, 2)
    assert page.evaluate(leave)
    with page.expect_download():
        page.click("#download-all")
    page.wait_for_selector("#download-all:enabled")
    assert not page.evaluate(leave)


def test_only_the_selected_image_keeps_decoded_pixels(page: Page) -> None:
    page.add_init_script(
        """window.openBitmaps = 0;
        const make = window.createImageBitmap, close = ImageBitmap.prototype.close;
        window.createImageBitmap = async (...all) => {
            const made = await make(...all);
            openBitmaps += 1;
            return made;
        };
        ImageBitmap.prototype.close = function () { openBitmaps -= 1; close.call(this); };
        const count = (value) => value instanceof ImageBitmap ? 1
            : Array.isArray(value) ? value.reduce((sum, each) => sum + count(each), 0)
            : value && typeof value === 'object' && !ArrayBuffer.isView(value)
            ? count(Object.values(value)) : 0;
        window.Worker = class extends Worker {
            constructor(...all) {
                super(...all);
                const add = ({data}) => { openBitmaps += count(data.result); };
                this.addEventListener('message', add);
            }
        };
        window.canvases = [];
        const element = document.createElement.bind(document);
        document.createElement = (name) => {
            const made = element(name);
            if (name === 'canvas') canvases.push(made);
            return made;
        };"""
    )
    page.reload()
    side = 300
    page.route("**/segment*", lambda route: send_mask(route, square_mask(side, side)))
    data = encode(nuclei(side, side)[0])
    tiff = encode(nuclei(side, side)[0], "TIFF")
    choose_files(page, *[(f"{n}.png", data) for n in range(6)], ("t.tif", tiff))
    wait_done(page, 7)
    full = f"canvases.filter((each) => each.width === {side}).length"
    for place in (1, 7, 3):
        page.click(f"#strip li:nth-child({place}) button")
        wait_drawn(page)
        assert page.evaluate("openBitmaps") <= 1  # the image
        assert page.evaluate(full) == 0


SET_THRESHOLD = """([value, event]) => {
    const slider = document.getElementById('threshold');
    slider.value = value;
    slider.dispatchEvent(new Event(event, {bubbles: true}));
}"""


def test_stopped_run_leaves_the_earlier_result_and_its_settings(page: Page) -> None:
    page.route(
        "**/segment*", lambda route: None if "threshold" in settings_of(route) else send_mask(route)
    )
    choose_files(page, ("a.png", CELLS), ("b.png", CELLS))
    wait_done(page, 2)
    page.evaluate(SET_THRESHOLD, ["0.3", "change"])
    page.wait_for_selector("#strip [data-state=working]")
    assert page.is_disabled("#download")
    page.click("#stop")
    wait_done(page, 2)
    row = read_table(unzip(save_file(page, "#download-all")[1]))[0]
    assert (row["threshold"], row["error"]) == ("0.65", "")


def test_one_request_brings_all_of_a_large_image(page: Page) -> None:
    side = 2048
    requests: list[list[str]] = []

    def serve(route: Route) -> None:
        requests.append(outputs_of(route))
        send_mask(route, square_mask(side, side))

    page.route("**/segment*", serve)
    choose_files(page, ("large.png", encode(square_mask(side, side))))
    wait_done(page)
    wait_drawn(page)
    before = canvas_pixels(page)
    for value in (0.3, 0.4, 0.5):  # they share one decoding
        page.evaluate(SET_THRESHOLD, [str(value), "input"])
    for _ in range(100):
        if (canvas_pixels(page) != before).any():  # the color of the preview
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the threshold is not previewed")
    choose_outputs(page, *ALL_KINDS)
    assert len(unzip(save_file(page)[1]).namelist()) == len(ALL_KINDS) + 2
    assert requests == [["mask", "polygons", "probability"]]
