"""The panel as a web page: `serve` starts a real Voilà, a real browser opens it, says who it is and rates."""
from http.cookiejar import CookieJar
from urllib.request import HTTPCookieProcessor, Request, build_opener
import json, os, re, signal, subprocess, sys

import pytest

pytest.importorskip("voila", reason="voila is not installed: pip install -e '.[dev]'")
from browser import needs_browser, opened
from test_panel_browser import (
    answers, at_home, free_port, make_project, press, shot, status, stored, wait_for,
)

pytestmark = needs_browser
SERVE = """
import sys
from mhrlhf.ratings.app import serve
sys.exit(serve('data/generated.csv', 'sqlite:///data/annotations/ratings.db', port=int(sys.argv[1])))
"""

@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    "The served panel: the study's folder and its address."
    folder, home, port = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("home"), free_port()
    make_project(folder)
    command, log = [sys.executable, "-c", SERVE, str(port)], folder / "page.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=folder, env=at_home(home), stdout=out, stderr=out,
                                  start_new_session=True)
    try:
        wait_for(lambda: "running at" in log.read_text() or server.poll() is not None, 120, log.read_text)
        yield folder, f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)

def test_somebody_without_jupyterlab_rates(page_of):
    folder, url = page_of
    with opened() as page:
        page.goto(url)
        page.get_by_placeholder("your name").fill("bert")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="start").click()
        page.wait_for_selector(".mhrlhf-panel[tabindex='0'] img:visible")
        for key in "7x034": press(page, folder, key)
        assert [v for _, _, v in stored(folder)] == [7, 10, 0, 3, 4]
        wait_for(lambda: "bert · image 2 of 14 · 1 done" in status(page))
        shot(page, "page.png")
        assert "RatingPanel" not in page.content() and "import os" not in page.content()   # no code is shown
        page.goto(url + "?rater=bert")   # the link of an invitation: no question, and on from where he was
        page.wait_for_selector(".mhrlhf-panel[tabindex='0'] img:visible")
        wait_for(lambda: "bert · image 2 of 14 · 1 done" in status(page))

def test_nothing_of_the_project_is_served_by_name(page_of):
    for path in ("data/generated.csv", "voila/files/data/generated.csv", "voila/files/../generated.csv",
                 "voila/files/rating.ipynb"):
        assert answers(page_of[1] + path) is None, path

# Invited people, on an address that others reach ----------------------------------------------------------------

GUARDED = SERVE.replace("sys.argv[1])", "sys.argv[1]), host='0.0.0.0', invitations='data/invitations.json'")

@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    "The panel served to invited people: the study's folder, its address, Ann's and Bob's secrets, the log."
    from mhrlhf.ratings.app import invite
    folder, home, port = tmp_path_factory.mktemp("guarded"), tmp_path_factory.mktemp("home"), free_port()
    make_project(folder)
    secrets = [invite(folder / "data/invitations.json", name) for name in ("ann", "bob")]
    command, log = [sys.executable, "-c", GUARDED, str(port)], folder / "page.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=folder, env=at_home(home), stdout=out, stderr=out,
                                  start_new_session=True)
    try:
        wait_for(lambda: "running at" in log.read_text() or server.poll() is not None, 120, log.read_text)
        yield folder, f"http://127.0.0.1:{port}", secrets, log
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)

def ask(opener, address):
    "The status of an answer and its text; redirects are followed."
    from urllib.error import HTTPError
    try:
        with opener.open(address, timeout=120) as answer:
            return answer.status, answer.url, answer.read().decode("utf-8", "replace")
    except HTTPError as e: return e.code, e.url, ""

def socket_at(address, place, jar=()):
    "A WebSocket, opened with somebody's cookies; the status of the answer if it is refused."
    import websocket   # of jupyter_server
    cookies = "; ".join(f"{c.name}={c.value}" for c in jar)
    try: return websocket.create_connection(address.replace("http", "ws") + place, timeout=120, cookie=cookies)
    except websocket.WebSocketBadStatusException as refused: return refused.status_code

def end_kernel(address, page, secret, how="POST"):
    "The status of the answer to somebody, with a secret, who wants to end the kernel of a page."
    place = dict(POST="/voila/api/shutdown/", DELETE="/api/kernels/")[how] + kernel_of(page)
    return ask(build_opener(), Request(f"{address}{place}?token={secret}", b"", method=how))[0]

def kernel_of(page): return re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", page)[0]

def check_sockets(folder, address, pages, jars):
    "Only one's own kernel is reached, and it takes no code."
    ann, bob = (f"/api/kernels/{kernel_of(page)}/channels" for page in pages)
    strange = "/api/kernels/12345678-1234-1234-1234-123456789abc/channels"
    assert socket_at(address, ann) in (401, 403) and socket_at(address, strange, jars[0]) in (403, 404)
    assert socket_at(address, bob, jars[0]) == socket_at(address, ann, jars[1]) == 403
    own = socket_at(address, ann, jars[0])
    for kind, content in (("execute_request", dict(code="open('made', 'w')", silent=False)),
                          ("kernel_info_request", {})):
        header = dict(msg_id=kind, username="ann", session="s", msg_type=kind, version="5.3")
        own.send(json.dumps(dict(header=header, parent_header={}, metadata={}, content=content, channel="shell")))
    heard = []
    while "kernel_info_reply" not in heard: heard.append(json.loads(own.recv())["msg_type"])
    own.close()
    assert "execute_reply" not in heard and not list(folder.rglob("made"))

def test_only_invited_people_come_in_and_nothing_else_is_served(guarded):
    from mhrlhf.ratings.app import withdraw
    folder, address, (ann, bob), log = guarded
    picture = next(folder.glob("data/images/*/*.png")).relative_to(folder)
    places = ["/voila/files/rating.ipynb", f"/voila/files/{picture}", f"/{picture}", "/voila/render/rating.ipynb",
              "/voila/files/data/generated.csv", "/api/kernels", "/api/contents", "/voila/tree",
              "/api/contents/data/generated.csv", "/files/data/generated.csv", "/voila/static/../../data/generated.csv",
              "/api/sessions", "/api/terminals", "/terminals/1", "/terminals/websocket/1", "/notebooks/rating.ipynb",
              "/nbconvert/html/rating.ipynb", "/tree", "/lab", "/doc/tree/rating.ipynb", "/api/kernelspecs"]
    stranger, guest = build_opener(), build_opener(HTTPCookieProcessor(CookieJar()))
    for query in "", "?rater=ann", "?token=ann", "?token=" + bob[::-1]:
        assert "/login" in ask(stranger, f"{address}/{query}")[1]
    for place in places:
        status, url, _ = ask(stranger, address + place)
        assert status in (403, 404) or "/login" in url, place
    status, _, text = ask(guest, f"{address}/?token={ann}&rater=bob")
    assert status == 200 and "voila" in text.lower() and "invitations.json" not in text
    for place in places: assert ask(guest, address + place)[0] in (403, 404), place
    jars = CookieJar(), CookieJar()
    pages = [ask(build_opener(HTTPCookieProcessor(jar)), f"{address}/?token={secret}")[2]
             for jar, secret in zip(jars, (ann, bob))]
    check_sockets(folder, address, pages, jars)
    for how in "POST", "DELETE":
        assert end_kernel(address, pages[0], bob, how) == end_kernel(address, pages[0], "none", how) == 403
    own = f"/api/kernels/{kernel_of(pages[0])}/channels"
    assert socket_at(address, own, jars[0]).connected
    assert end_kernel(address, pages[0], ann) == 204   # as the closing page of Ann does
    assert socket_at(address, own, jars[0]) == 403
    withdraw(folder / "data/invitations.json", "ann")
    for opener in stranger, guest: assert "/login" in ask(opener, f"{address}/?token={ann}")[1]
    assert ann not in log.read_text() and bob not in log.read_text()
