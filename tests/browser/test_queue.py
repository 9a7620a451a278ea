"""Images waiting for a service that is busy, away, or back again. Answers are stubs."""

from __future__ import annotations

from playwright.sync_api import Page, Route

from tests.browser.conftest import always, answer, choose, done, drawn, over, refuse, square
from tests.conftest import encode, nuclei

CELLS = encode(nuclei(64, 64)[0])


def test_a_service_that_is_away_for_a_moment_costs_nothing(
    page: Page, tolerated: list[str]
) -> None:
    tolerated += ["ERR_CONNECTION_REFUSED", "503", "504", "502"]
    troubles = ["away", "502", "504", "503"]

    def serve(route: Route) -> None:
        trouble = troubles.pop(0) if troubles else ""
        if trouble == "away":
            route.abort("connectionrefused")
        elif trouble:
            refuse(route, int(trouble), "come back later", Retry_After="1")
        else:
            answer(route)

    page.route("**/segment*", serve)
    page.evaluate(
        """() => {
            window.told = '';
            const status = document.getElementById('status');
            new MutationObserver(() => { told += status.textContent; })
                .observe(status, {childList: true, characterData: true, subtree: true});
        }"""
    )
    choose(page, *[(f"{n}.png", CELLS) for n in range(5)])
    done(page, 5)
    assert troubles == []
    assert "The service cannot be reached; trying again" in page.evaluate("told")
    assert page.inner_text("#status") == "5 masks made"
    assert not page.is_visible("#retry")


def test_what_failed_can_be_tried_again(page: Page, tolerated: list[str]) -> None:
    tolerated += ["ERR_CONNECTION_REFUSED"]
    there = False
    asked = []

    def serve(route: Route) -> None:
        asked.append(route.request.url)
        answer(route) if there else route.abort("connectionrefused")

    page.route("**/segment*", serve)
    page.clock.install()
    choose(page, ("a.png", CELLS), ("b.png", CELLS))
    page.wait_for_selector("#strip [data-state=working]")
    while page.locator("#strip [data-state=failed]").count() < 2:
        page.clock.run_for(30_000)
        page.wait_for_timeout(50)
        assert len(asked) < 100
    assert 4 < len(asked) / 2 < 20
    assert page.inner_text("#error") == "The service cannot be reached."
    assert page.inner_text("#status") == "2 failed"
    assert page.is_disabled("#download")
    there = True
    page.click("#retry")
    done(page, 2)
    assert not page.is_visible("#retry")
    assert not page.is_visible("#error")


def test_a_refused_image_is_not_sent_again(page: Page) -> None:
    asked = []

    def serve(route: Route) -> None:
        asked.append(route.request.url)
        refuse(route, 422, "not an image")

    page.route("**/segment*", serve)
    choose(page, ("a.png", CELLS))
    over(page)
    assert (len(asked), page.inner_text("#error")) == (1, "not an image")


def test_clear_removes_everything_also_what_is_on_its_way(page: Page) -> None:
    stuck: list[Route] = []

    def serve(route: Route) -> None:
        answer(route) if len(stuck) == 3 else stuck.append(route)

    page.route("**/segment*", serve)
    choose(page, *[(f"{n}.png", CELLS) for n in range(4)])
    page.wait_for_function("document.querySelectorAll('[data-state=working]').length === 3")
    page.click("#clear")
    assert page.locator("#strip li").count() == 0
    assert not page.is_visible("#work")
    assert page.inner_text("#status") == ""
    page.wait_for_timeout(200)
    choose(page, ("new.png", CELLS))  # in a place that the others have left
    done(page)
    assert page.inner_text("#name") == "new.png"

    questions = []
    page.once("dialog", lambda dialog: (questions.append(dialog.message), dialog.dismiss()))
    page.click("#clear")
    assert "not downloaded" in questions[0]
    assert page.locator("#strip li").count() == 1
    with page.expect_download():
        page.click("#download")
    page.click("#clear")
    assert page.locator("#strip li").count() == 0


def test_leaving_with_masks_not_downloaded_is_asked_about(page: Page) -> None:
    page.route("**/segment*", always)
    leave = """() => !dispatchEvent(new Event('beforeunload', {cancelable: true}))"""
    assert not page.evaluate(leave)
    page.click("[data-sample*=fluorescence]")  # of a sample there is another
    done(page)
    assert not page.evaluate(leave)
    choose(page, ("a.png", CELLS))
    done(page, 2)
    assert page.evaluate(leave)
    with page.expect_download():
        page.click("#download-all")
    page.wait_for_selector("#download-all:enabled")
    assert not page.evaluate(leave)


def test_all_run_again_with_another_threshold(page: Page) -> None:
    asked: list[str] = []

    def serve(route: Route) -> None:
        asked.append(route.request.url.partition("?")[2])
        answer(route)

    page.route("**/segment*", serve)
    choose(page, ("a.png", CELLS))
    done(page)
    assert "Threshold" not in page.inner_text("#facts")
    page.fill("#threshold", "0.3")
    choose(page, ("b.png", CELLS))
    done(page, 2)
    page.fill("#threshold", "7")
    page.click("#again")
    page.wait_for_function("document.getElementById('threshold').value === '1'")
    done(page, 2)
    page.fill("#threshold", "")
    choose(page, ("c.png", CELLS))
    done(page, 3)
    thresholds = [dict(each.split("=") for each in query.split("&")) for query in asked]
    assert [each.get("threshold") for each in thresholds] == [None, "0.3", "1", "1", None]
    page.click("#strip li:first-child button")
    drawn(page)
    assert "Threshold\n1" in page.inner_text("#facts")


def test_images_that_are_not_shown_keep_no_pixels(page: Page) -> None:
    page.add_init_script(
        """window.open_ = 0;
        const make = window.createImageBitmap, close = ImageBitmap.prototype.close;
        window.createImageBitmap = async (...all) => {
            const made = await make(...all);
            open_ += 1;
            return made;
        };
        ImageBitmap.prototype.close = function () { open_ -= 1; close.call(this); };
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
    page.route("**/segment*", lambda route: answer(route, square(side, side)))
    data = encode(nuclei(side, side)[0])
    tiff = encode(nuclei(side, side)[0], "TIFF")
    choose(page, *[(f"{n}.png", data) for n in range(6)], ("t.tif", tiff))
    done(page, 7)
    full = f"canvases.filter((each) => each.width === {side}).length"
    for place in (1, 7, 3):
        page.click(f"#strip li:nth-child({place}) button")
        drawn(page)
        assert page.evaluate("open_") <= 2  # the shown image and its mask
        assert page.evaluate(full) <= 3  # its layers, and the image of a TIFF
