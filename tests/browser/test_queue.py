"""Retries, clearing and re-running. The tests respond in place of the service."""

from __future__ import annotations

from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import (
    always_send_mask,
    choose_files,
    send_mask,
    send_problem,
    square_mask,
    thumbnails,
    wait_done,
    wait_drawn,
    wait_finished,
)
from tests.conftest import encode, nuclei

CELLS = encode(nuclei(64, 64)[0])


def test_temporary_errors_are_retried(page: Page, expected_errors: list[str]) -> None:
    expected_errors += ["ERR_CONNECTION_REFUSED", "503", "504", "502"]
    errors = ["unreachable", "502", "504", "503"]

    def serve(route: Route) -> None:
        error = errors.pop(0) if errors else ""
        if error == "unreachable":
            route.abort("connectionrefused")
        elif error:
            send_problem(route, int(error), "temporary", Retry_After="1")
        else:
            send_mask(route)

    page.route("**/segment*", serve)
    page.evaluate(
        """() => {
            window.messages = '';
            const status = document.getElementById('status');
            new MutationObserver(() => { messages += status.textContent; })
                .observe(status, {childList: true, characterData: true, subtree: true});
        }"""
    )
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(5)])
    wait_done(page, 5)
    assert errors == []
    assert "The server cannot be reached; retrying" in page.evaluate("messages")
    assert page.inner_text("#status") == "5 done"
    assert not page.is_visible("#retry")


def test_failed_images_can_be_retried(page: Page, expected_errors: list[str]) -> None:
    expected_errors += ["ERR_CONNECTION_REFUSED"]
    reachable = False
    requests: list[str] = []

    def serve(route: Route) -> None:
        requests.append(route.request.url)
        send_mask(route) if reachable else route.abort("connectionrefused")

    page.route("**/segment*", serve)
    page.clock.install()
    choose_files(page, ("a.png", CELLS), ("b.png", CELLS))
    page.wait_for_selector("#strip [data-state=working]")
    while page.locator("#strip [data-state=failed]").count() < 2:
        page.clock.run_for(30_000)
        page.wait_for_timeout(50)
        assert len(requests) < 100
    assert 4 < len(requests) / 2 < 20
    assert page.inner_text("#error") == "The server cannot be reached."
    assert page.inner_text("#status") == "2 failed"
    assert page.is_disabled("#download")
    reachable = True
    page.click("#retry")
    wait_done(page, 2)
    assert not page.is_visible("#retry")
    assert not page.is_visible("#error")


def test_rejected_image_is_not_retried(page: Page) -> None:
    requests: list[str] = []

    def serve(route: Route) -> None:
        requests.append(route.request.url)
        send_problem(route, 422, "not an image")

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", CELLS))
    wait_finished(page)
    assert (len(requests), page.inner_text("#error")) == (1, "not an image")


def test_clear_removes_images_that_are_being_processed(page: Page) -> None:
    stuck: list[Route] = []

    def serve(route: Route) -> None:
        send_mask(route) if len(stuck) == 3 else stuck.append(route)

    page.route("**/segment*", serve)
    choose_files(page, *[(f"{n}.png", CELLS) for n in range(4)])
    expect(thumbnails(page, "working")).to_have_count(3)
    page.click("#clear")
    assert page.locator("#strip li").count() == 0
    assert not page.is_visible("#work")
    assert page.inner_text("#status") == ""
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


def test_threshold_applies_to_new_and_rerun_images(page: Page) -> None:
    requests: list[str] = []

    def serve(route: Route) -> None:
        requests.append(route.request.url.partition("?")[2])
        send_mask(route)

    page.route("**/segment*", serve)
    choose_files(page, ("a.png", CELLS))
    wait_done(page)
    assert "Threshold" not in page.inner_text("#facts")
    page.fill("#threshold", "0.3")
    choose_files(page, ("b.png", CELLS))
    wait_done(page, 2)
    page.fill("#threshold", "7")
    page.click("#again")
    expect(page.locator("#threshold")).to_have_value("1")
    wait_done(page, 2)
    page.fill("#threshold", "")
    choose_files(page, ("c.png", CELLS))
    wait_done(page, 3)
    thresholds = [dict(each.split("=") for each in query.split("&")) for query in requests]
    assert [each.get("threshold") for each in thresholds] == [None, "0.3", "1", "1", None]
    page.click("#strip li:first-child button")
    wait_drawn(page)
    assert "Threshold\n1" in page.inner_text("#facts")


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
        assert page.evaluate("openBitmaps") <= 2  # the image and its mask
        assert page.evaluate(full) <= 3  # area, outline, and the image of a TIFF
