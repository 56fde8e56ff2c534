"""The console in a real browser, against a fake of the API that can fail on demand, and against the service itself."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.workers.console_fake import RECEIPT, Fake, fake_api
from tests.workers.service import ITEMS, Service, until

OUT = Path(__file__).parents[2] / "out" / "console"
DESKTOP, PHONE = {"width": 1400, "height": 900}, {"width": 400, "height": 800}
# Without these it looks for its maker's hosts at every start.
QUIET = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of this module only: asyncio tests cannot run while Playwright's loop does."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        assert not os.environ.get("CI"), "CI needs Chromium: .ci/run installs it"
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=QUIET, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a fresh profile. What it reports of itself (script errors, CSP violations) fails the test."""
    context = browser.new_context(viewport=DESKTOP, locale="en-US")  # type: ignore[arg-type]
    context.set_default_timeout(15_000)
    page, complaints = context.new_page(), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if "Security Policy" in message.text else None)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    with fake_api() as running:
        yield running


def opened(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#list li")).to_have_count(12)
    expect(page.locator("#status")).to_have_text("Live")
    return page


def titles(page: Page) -> list[str]:
    return page.locator("#list .item").all_text_contents()


def click_and_follow(page: Page, query: str) -> None:
    """Click the first item found; the list has moved and the click's path is drawn when this returns."""
    before = titles(page)
    page.get_by_label("Search items").fill(query)
    item = page.locator("#items button").first
    expect(item).to_contain_text(query)
    item.click()
    expect(page.locator("#path .sum")).to_contain_text("ms from click to list")
    assert titles(page) != before


def test_a_click_moves_the_list_and_shows_its_path(page: Page, fake: tuple[Fake, str]) -> None:
    opened(page, fake[1])
    expect(page.locator("#source")).to_have_text("popular")
    expect(page.locator("#note")).to_contain_text("Cold start")
    click_and_follow(page, "jazz piano")
    expect(page.locator("#source")).to_have_text("personal")
    expect(page.locator("#list li").first).to_contain_text(
        "because of jazz piano, part 0 · 61 % of the 72 % that can be explained"
    )
    expect(page.locator("#announce")).to_contain_text("List updated. First: jazz piano")
    sent = fake[0].bodies[0]
    path = fake[0].paths[sent["user_id"]]
    expect(page.locator(".event-id")).to_have_text(sent["event_id"])
    expect(page.locator("#path")).to_contain_text(f"partition {path['partition']}, offset {path['offset']}")
    labels = [label.split("\n")[0] for label in page.locator("#path .hops li span").all_inner_texts()]
    assert labels == [
        "Clicked in this browser", "Kafka took it", "User's state updated", "Vector updated, list made",
        "Published to Kafka", "Server read the list", "Pushed to this browser", "Shown",
    ]  # fmt: skip
    hops = page.locator("#path .hops li b").all_text_contents()
    assert hops[2:7] == ["2 ms", "4 ms", "1 ms", "1 ms", "1 ms"]
    expect(page.locator("#history li")).to_have_text(["jazz piano, part 01.0"])
    for at, said in enumerate((r"ms: p50 \d+, p99 \d+", r"events [\d.]+$", r"served 0\.1\d+, popularity 0\.062")):
        expect(page.locator("#charts .plot").nth(at)).to_have_attribute("aria-label", re.compile(said))
    page.screenshot(path=OUT / "click.png", animations="disabled")


def test_why_a_list_is_popular(page: Page, fake: tuple[Fake, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Clicks there are, on items that the generation does not know: no cold start."""
    reason = {"source": "popular", "fallback": "generation g knows none of the items"}
    whole = fake[0].answer
    monkeypatch.setattr(
        fake[0], "answer", lambda user, k: whole(user, k) | reason | {"as_of": {"partition": 1, "offset": 4}}
    )
    expect(opened(page, fake[1]).locator("#note")).to_have_text(f"Fallback: {reason['fallback']}")


def test_clocks_that_differ_give_no_negative_hop(page: Page, fake: tuple[Fake, str]) -> None:
    fake[0].set(ahead_ms=3_600_000)
    opened(page, fake[1])
    click_and_follow(page, "chess")
    assert not any(hop.startswith("-") for hop in page.locator("#path .hops li b").all_text_contents())
    expect(page.locator("#path")).to_contain_text("The clocks of browser and server differ")


def test_forget_me(page: Page, fake: tuple[Fake, str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened(page, fake[1])
    click_and_follow(page, "chess")
    page.get_by_role("button", name="Forget me").click()
    page.get_by_role("button", name="Cancel").click()
    assert fake[0].clicks
    page.get_by_role("button", name="Forget me").click()
    page.locator("#forget-dialog .danger").click()
    expect(page.locator("#receipt")).to_contain_text("Forgotten. Receipt 3-7; gone from every store by Jan 2, 1970.")
    expect(page.locator("#source")).to_have_text("popular")
    assert not fake[0].clicks
    monkeypatch.setitem(RECEIPT, "gone_by_ms", None)
    page.get_by_role("button", name="Forget me").click()
    page.locator("#forget-dialog .danger").click()
    expect(page.locator("#receipt")).to_have_text("Forgotten. Receipt 3-7; a topic keeps the clicks without end.")


def test_in_chinese_and_back(page: Page, fake: tuple[Fake, str]) -> None:
    opened(page, fake[1])
    page.get_by_role("button", name="中文").click()
    expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(page.locator("#status")).to_have_text("实时")
    page.reload()  # kept
    expect(page.locator("#ranked-title")).to_contain_text("当前推荐")
    left = page.evaluate("document.body.innerText.match(/[A-Za-z]{3,}/g).filter(word => !/^[a-z0-9-]+$/.test(word))")
    assert set(left) <= {"Upwell", "English", "API", "Kafka"}
    page.get_by_role("button", name="English").click()
    expect(page.locator("html")).to_have_attribute("lang", "en")


def test_honest_states(page: Page, fake: tuple[Fake, str]) -> None:
    api, url = fake
    opened(page, url)
    api.set(refusals=1)
    page.locator("#items button").first.click()
    expect(page.locator("#path .sum")).to_contain_text("Kafka does not take it; trying again")
    expect(page.locator("#path .sum")).to_contain_text("ms from click to list")
    assert api.events_total == 1  # sent again under one id
    api.set(connected=False)
    expect(page.locator("#status")).to_contain_text("Kafka is away: lists stay as of")
    before = titles(page)
    api.take({"event_id": "e", "user_id": page.locator("#people input:checked").input_value(), "item_id": "i2"})
    until(lambda: titles(page) != before, "the list is there")
    expect(page.locator("#status")).to_contain_text("Kafka is away")
    page.locator("#people label").nth(1).click()
    expect(page.locator("#note")).to_contain_text("Cold start")
    page.wait_for_timeout(300)
    expect(page.locator("#status")).to_contain_text("Kafka is away")
    page.locator("#people label").first.click()
    api.set(connected=True)
    expect(page.locator("#status")).to_have_text("Live")
    api.set(stale=True)
    page.locator("#items button").nth(1).click()
    expect(page.locator("#note")).to_contain_text("Stale")
    page.route("**/v1/stream**", lambda route: route.abort())
    api.close_streams()
    expect(page.locator("#status")).to_contain_text("Reconnecting … list as of")
    page.unroute("**/v1/stream**")
    expect(page.locator("#status")).to_have_text("Live")


def test_no_list_stands_under_another_user_s_name(page: Page, fake: tuple[Fake, str]) -> None:
    """Who looks after customers would read one's clicks as another's."""
    opened(page, fake[1])
    click_and_follow(page, "chess")
    page.route("**/v1/users/**", lambda route: route.abort())
    page.route("**/v1/stream**", lambda route: route.abort())
    page.locator("#people label").nth(1).click()
    expect(page.locator("#status")).to_contain_text("Reconnecting … list as of –")
    expect(page.locator("#list li")).to_have_count(0)
    for part in ("#source", "#note", "#as-of"):
        expect(page.locator(part)).to_have_text("")
    page.get_by_role("button", name="中文").click()
    expect(page.locator("#list li")).to_have_count(0)
    page.unroute("**/v1/users/**")  # the stream is still away
    expect(page.locator("#list li")).to_have_count(12)


def test_no_list_stands_after_its_user_is_erased(page: Page, fake: tuple[Fake, str]) -> None:
    opened(page, fake[1])
    click_and_follow(page, "chess")
    page.route("**/v1/users/**", lambda route: route.fallback() if route.request.method == "DELETE" else route.abort())
    page.route("**/v1/stream**", lambda route: route.abort())
    page.get_by_role("button", name="Forget me").click()
    page.locator("#forget-dialog .danger").click()
    expect(page.locator("#status")).to_contain_text("Reconnecting … list as of –")
    expect(page.locator("#list li")).to_have_count(0)
    expect(page.locator("#history")).to_have_text("None yet.")


def test_a_key_is_asked_for_and_used(page: Page, fake: tuple[Fake, str]) -> None:
    api, url = fake
    api.set(key="open-sesame")
    page.goto(url)
    expect(page.locator("#status")).to_have_text("An API key is needed")
    page.get_by_role("button", name="API key").click()
    page.locator("#key-dialog input").fill("open-sesame")
    page.locator("#key-dialog input").press("Enter")
    expect(page.locator("#list li")).to_have_count(12)
    expect(page.locator("#status")).to_have_text("Live")
    click_and_follow(page, "sailing")
    api.tickets.clear()  # run out: another is asked for
    api.close_streams()
    expect(page.locator("#status")).to_contain_text("Reconnecting")
    expect(page.locator("#status")).to_have_text("Live")
    click_and_follow(page, "chess")
    assert page.evaluate("JSON.stringify(localStorage)").find("sesame") < 0


def test_personas_click_by_themselves(page: Page, fake: tuple[Fake, str]) -> None:
    opened(page, fake[1])
    play = page.get_by_role("button", name="Let Likes chess click")
    play.click()
    expect(page.locator("#list li").first).to_contain_text("because of chess")
    page.get_by_role("button", name="Stop Likes chess").click()
    assert {body["user_id"] for body in fake[0].bodies} == {page.locator("#people input:checked").input_value()}


def test_by_keyboard_alone(page: Page, fake: tuple[Fake, str]) -> None:
    opened(page, fake[1])
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    first = page.locator("#list .item").first
    expect(first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#path .sum")).to_contain_text("ms from click to list")
    expect(first).to_be_focused()  # the one clicked has gone: who took its place
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#history li")).to_have_count(2)


def test_a_title_is_text(page: Page, fake: tuple[Fake, str]) -> None:
    evil = '<img src=x onerror="document.title=1">'
    page.route("**/v1/items**", lambda route: route.fulfill(json={"items": [
        {"item_id": "i0", "title": evil, "categories": [evil], "available": True}
    ]}))  # fmt: skip
    opened(page, fake[1])
    expect(page.locator("#items button").first).to_contain_text(evil)
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, fake: tuple[Fake, str], scheme: str) -> None:
    # Without motion: axe takes a colour on its way for the colour meant.
    context = browser.new_context(viewport=PHONE, color_scheme=scheme, locale="en-US", reduced_motion="reduce")  # type: ignore[arg-type]
    page = opened(context.new_page(), fake[1])
    click_and_follow(page, "chess")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.screenshot(path=OUT / f"phone-{scheme}.png", full_page=True)
    page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]
    page.screenshot(path=OUT / f"desktop-{scheme}.png")
    for view in (None, "#key", "#forget"):
        if view:
            page.locator(view).click()
        found = Axe().run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
        page.keyboard.press("Escape")
    context.close()


def test_the_service_itself(page: Page, service: Service) -> None:
    """One click through Kafka and the worker: the list moves, and the path is the one that Kafka knows."""
    title = ITEMS[22].title
    assert service.call("/v1/items", msgspec.to_builtins(ITEMS[22]))[0] == 202  # schemathesis posts items, too
    until(lambda: title in str(service.call(f"/v1/items?q={quote(title)}")[1]), "the item has its title")
    opened(page, f"{service.url}/")
    expect(page.locator("#source")).to_have_text("popular")
    click_and_follow(page, title)
    expect(page.locator("#source")).to_have_text("personal")
    expect(page.locator("#list li").first).to_contain_text(f"because of {title}")
    user_id = page.locator("#people input:checked").input_value()
    _, answer = service.call(f"/v1/users/{user_id}/recommendations?k=12")
    assert titles(page) == [item["title"] for item in answer["items"]]
    place = "partition {partition}, offset {offset}".format(**answer["as_of"])
    expect(page.locator("#path")).to_contain_text(place)
    expect(page.locator("#generation-name")).to_have_text(answer["generation"])
    page.screenshot(path=OUT / "service.png", animations="disabled")
    expect(page.locator("#history li")).to_have_text(f"{title}1.0")
    page.get_by_role("button", name="Forget me").click()
    page.locator("#forget-dialog .danger").click()
    expect(page.locator("#receipt")).to_contain_text(f"Forgotten. Receipt {answer['as_of']['partition']}-")
    expect(page.locator("#source")).to_have_text("popular", timeout=10_000)
    expect(page.locator("#history")).to_have_text("None yet.")
