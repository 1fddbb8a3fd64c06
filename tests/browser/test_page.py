"""The monitor's page in a real browser: live, reloaded, attacked, dark, narrow, by keyboard, read aloud."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from p2ptrain.events import Previewed, RolledBack
from tests.browser.chrome import chromium
from tests.browser.simulated import HOSTILE, INVITE, Simulated

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """The page, once it is live; it may complain of nothing."""
    context = await browser.new_context(**options)
    page = await context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(url)
    await expect(page.locator("#link")).to_have_text("● live", timeout=15_000)
    yield page
    assert [each for each in complaints if "example.org" not in each] == []
    await context.close()


def swarm() -> Simulated:
    simulated = Simulated(5)
    now = time.time()
    simulated.present(now)
    simulated.history(300, now - 1)
    simulated.pause(4, now)
    simulated.publish(now)
    return simulated


async def test_page_shows_the_swarm_and_follows_it(browser: Browser) -> None:
    simulated = swarm()
    async with simulated.served() as url, opened(browser, url) as page:
        await expect(page.locator("#run-name")).to_have_text("simulated")
        await expect(page.locator("#step")).to_have_text("300")
        await expect(page.locator("#phase")).to_contain_text("training")
        await expect(page.locator("#peers-note")).to_have_text("and 1 paused")
        await expect(page.locator("#sample")).to_contain_text("def f250")
        assert await page.locator(".uplot").count() == 2
        row = page.locator("#peers tbody tr", has_text="peer-4")
        await expect(row).to_contain_text("paused")
        await expect(row).to_contain_text("you asked for it")

        simulated.round(time.time())
        simulated.publish(time.time())
        await expect(page.locator("#step")).to_have_text("301")

        rolled = RolledBack(from_step=300, to_step=290, samples_lost=99, lineage="c" * 64)
        simulated.tell(2, time.time(), rolled)
        simulated.publish(time.time())
        await expect(page.locator("#incidents")).to_contain_text("peer-2")
        await expect(page.locator("#incidents")).to_contain_text("→ look at its network")
        await expect(page.locator("#log li").first).to_contain_text("rolled back from step 300 to 290")

        await page.reload()
        await expect(page.locator("#step")).to_have_text("301")
        await expect(page.locator("#log li").first).to_contain_text("rolled back from step 300 to 290")


async def test_page_goes_on_when_the_monitor_was_away(browser: Browser) -> None:
    simulated = swarm()
    context = await browser.new_context()
    page = await context.new_page()
    async with simulated.served() as url:
        await page.goto(url)
        await expect(page.locator("#step")).to_have_text("300")
    await expect(page.locator("#link")).to_contain_text("does not answer")
    await expect(page.locator("#step")).to_have_text("300")
    simulated.round(time.time())
    simulated.publish(time.time())
    async with simulated.served(port=int(url.rsplit(":", 1)[1].rstrip("/"))):
        await expect(page.locator("#step")).to_have_text("301", timeout=15_000)
        await expect(page.locator("#link")).to_have_text("● live")
        await context.close()


async def test_hostile_peer_is_only_text(browser: Browser) -> None:
    simulated = swarm()
    simulated.tell(0, time.time(), Previewed(step=400, text="<script>alert(1)</script>"))
    async with simulated.served() as url, opened(browser, url) as page:
        dialogs: list[Any] = []
        page.on("dialog", lambda dialog: dialogs.append(dialog))
        await expect(page.locator("#peers tbody")).to_contain_text(HOSTILE)
        await expect(page.locator("#sample")).to_have_text("<script>alert(1)</script>")
        assert await page.locator("main img:not(#qr)").count() == 0
        assert await page.locator("main script").count() == 0
        assert dialogs == []
        assert await page.title() != "1"
        refused = await page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'refused')")
        assert refused == "refused", "the page's policy lets it speak to its monitor alone"


async def test_join_box_has_the_command_and_its_code(browser: Browser) -> None:
    simulated = swarm()
    async with simulated.served() as url, opened(browser, url) as page:
        await expect(page.locator("#join")).to_have_text(f"p2ptrain join {INVITE}")
        assert await page.evaluate("document.getElementById('qr').decode().then(() => true)")


async def test_page_looks_back_and_returns(browser: Browser) -> None:
    simulated = swarm()
    async with simulated.served() as url, opened(browser, url) as page:
        slider = page.locator("#slider")
        await slider.focus()
        for _ in range(60):
            await page.keyboard.press("ArrowLeft")
        await expect(page.locator("#step")).to_have_text("239")
        await expect(page.locator("#phase")).to_have_text("◀ looking back")
        await expect(page.locator("#sample")).to_contain_text("def f200")
        simulated.round(time.time())
        simulated.publish(time.time())
        await expect(page.locator("#step")).to_have_text("239")
        await page.locator("#live").click()
        await expect(page.locator("#step")).to_have_text("301")


async def test_row_out_of_sight_is_up_to_date_when_it_is_scrolled_to(browser: Browser) -> None:
    simulated = Simulated(80)
    now = time.time()
    simulated.present(now)
    simulated.history(50, now - 1, members=80)
    async with simulated.served() as url, opened(browser, url) as page:
        await expect(page.locator("#peers tbody tr")).to_have_count(80)
        for step in range(50, 53):
            simulated.round(time.time())
            simulated.publish(time.time())
            await expect(page.locator("#step")).to_have_text(str(step + 1))
        last = page.locator("#peers tbody tr").last
        await last.scroll_into_view_if_needed()
        await expect(last.locator("td").nth(3)).to_have_text("52")


async def test_everything_is_reached_by_keyboard(browser: Browser) -> None:
    simulated = swarm()
    async with simulated.served() as url, opened(browser, url) as page:
        reached = []
        for _ in range(20):
            await page.keyboard.press("Tab")
            reached.append(
                await page.evaluate("document.activeElement.id || document.activeElement.className")
            )
        for name in ("skip", "theme", "timeline", "scroll", "sample", "copy", "log", "slider"):
            assert name in reached, reached
        await page.locator("#timeline").focus()
        await page.keyboard.press("ArrowLeft")
        await expect(page.locator("#round-detail")).to_contain_text("Step 299")
        await page.keyboard.press("ArrowLeft")
        await expect(page.locator("#round-detail")).to_contain_text("Step 298")
        await page.locator("[data-axis=time]").focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("[data-axis=time]")).to_have_attribute("aria-pressed", "true")


async def test_failure_is_named_and_not_only_red(browser: Browser) -> None:
    simulated = swarm()
    async with simulated.served() as url, opened(browser, url) as page:
        await page.locator("#timeline").focus()
        for _ in range(9):
            await page.keyboard.press("ArrowLeft")
        await expect(page.locator("#round-detail")).to_contain_text("✕ Failed at")
        await page.locator("#only-warnings").check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
async def test_page_fits_and_can_be_read_by_all(browser: Browser, scheme: Any, width: int) -> None:
    """No finding of axe that is serious or worse, and nothing that has to be scrolled sideways."""
    simulated = swarm()
    simulated.tell(2, time.time(), RolledBack(from_step=300, to_step=290, samples_lost=9, lineage="c" * 64))
    simulated.tell(3, time.time(), waiting="1 of 2 peers")
    simulated.publish(time.time())
    size = {"width": width, "height": 800}
    async with (
        simulated.served() as url,
        opened(browser, url, viewport=size, color_scheme=scheme) as page,
    ):
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) < 150) == (scheme == "dark")
        assert await page.evaluate("document.documentElement.scrollWidth") == width
        found = (await Axe().run(page)).response["violations"]
        grave = [each for each in found if each["impact"] in {"serious", "critical"}]
        assert not grave, [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in grave]


async def test_theme_that_was_chosen_stays(browser: Browser) -> None:
    simulated = swarm()
    async with (
        simulated.served() as url,
        opened(browser, url, color_scheme="light") as page,
    ):
        await page.locator("#theme").click()
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"
        await page.reload()
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"
