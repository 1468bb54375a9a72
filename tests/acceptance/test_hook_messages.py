"""docs/hooks.md: Slack-compatible senders, anything else, and templates, by the page's own commands, with a homeserver.

FLOWBRIDGE_SCREENSHOTS=1 also makes the pictures again.
"""

import json
import os
import sys
from pathlib import Path

import httpx

from tests import transcripts
from tests.acceptance.test_hook_recipes import PAGE, Desk, desk
from tests.patience import until
from tests.processes import run

__all__ = ["desk"]  # the fixture


def play(desk: Desk, recipe: str) -> None:
    """Run the commands of a recipe but for the first one, which made the hook."""
    _, *script = transcripts.steps(recipe)
    assert script
    for step, code, printed in transcripts.play(script, desk.folder, {"PATH": os.environ["PATH"]}):
        answer = next(line for line in reversed(printed.splitlines()) if line.startswith(("{", "ok")))  # not progress
        assert code == 0, printed
        assert step.is_printed(answer), f"{step.command}\n{printed}"


def test_beginning_of_the_page(desk: Desk) -> None:
    """The hook, and the line that its making prints."""
    before = len(desk.room.messages())
    (step,) = transcripts.steps(transcripts.replaced(PAGE.partition("\n## ")[0], {"!ops:example.org": desk.room.id}))
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    public = {"FLOWBRIDGE_PUBLIC_URL": "https://bridge.example.org"}
    ((_, code, printed),) = transcripts.play([step], desk.folder, path | desk.settings | public)
    assert code == 0, printed
    assert step.is_printed(printed), printed
    line = printed.splitlines()[-1].replace(public["FLOWBRIDGE_PUBLIC_URL"], desk.bridge)
    ((_, code, answer),) = transcripts.play([transcripts.Step(line, "")], desk.folder, path)
    assert (code, '{"ok":true,"delivery_id":"' in answer) == (0, True), answer
    (event,) = desk.wait_for(1, before)
    assert event["content"]["body"] == "A test of the hook first"


def test_slack_compatible_senders(desk: Desk) -> None:
    before = len(desk.room.messages())
    recipe = desk.recipe("Slack-compatible senders")
    play(desk, recipe)
    (event,) = desk.wait_for(1, before)
    assert event["content"]["body"] == (
        "💾 Backups\n\nBackup of db-1 failed: what to do (https://wiki.example.org/backup)\n\n"
        "- Host: db-1\n- Since: yesterday"
    )
    assert event["content"]["m.mentions"] == {}
    desk.picture("hook-slack", [event], 0)
    # Slack's own path, as the page has it.
    (path,) = {word.strip("`.") for word in recipe.split() if "/services/T/B/" in word}
    answer = httpx.post(path, json={"text": "<!channel> *down*"}, trust_env=False)
    assert (answer.status_code, answer.text) == (200, "ok")
    (event,) = desk.wait_for(1, before + 1)
    assert event["content"]["body"] == "@channel down"
    assert event["content"]["m.mentions"] == {}
    answer = httpx.post(path, json={"other": "x"}, trust_env=False)
    assert answer.status_code == 400
    assert "has nothing to show: it needs text, blocks or attachments that hold a text" in answer.text


def test_anything_else(desk: Desk) -> None:
    before = len(desk.room.messages())
    recipe = desk.recipe("Anything else")
    play(desk, recipe)
    text, message, summary = desk.wait_for(3, before)
    assert text["content"]["body"] == "the backup of db-1 failed"
    assert message["content"]["body"] == "Backup\n**db-1** is being saved …"
    assert summary["content"]["body"] == (
        "Backup failed (https://backup.example.org/runs/17) — error\n\n"
        "- host: db-1\n- started at: 2026-11-29 02:00 UTC\n- run: bytes: 0 · api token: ••• · id: 17"
    )
    (url,) = {word for word in recipe.split() if word.startswith("http") and "/hooks/anything/" in word}
    done = {"title": "Backup", "markdown": "**db-1** is saved", "key": "db-1"}
    assert httpx.post(url, json=done, trust_env=False).status_code == 200
    (edit,) = desk.wait_for(1, before + 3)
    assert edit["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": message["event_id"]}
    desk.picture("hook-anything", [text, message, edit, summary], 0, 1, 3)
    for other, body in (
        ("/webhook/", {"text": "t", "html": "<i>of hookshot</i>", "username": "U"}),
        ("/api/v1/matrix/hook/", {"text": "<b>of appservice-webhooks</b>", "format": "html", "displayName": "D"}),
    ):
        path = f"{desk.bridge}{other}{url.rpartition('/')[2]}"
        assert httpx.post(path, json=body, trust_env=False).status_code == 200
    hookshot, appservice = desk.wait_for(2, before + 4)
    assert hookshot["content"]["body"] == "U\n\nof hookshot"
    assert appservice["content"]["body"] == "D\n\nof appservice-webhooks"


def test_template_of_the_page(desk: Desk) -> None:
    before = len(desk.room.messages())
    section = transcripts.section(PAGE, "Templates")
    (template,) = transcripts.blocks(section, "jinja")
    (make,) = transcripts.steps(section)
    (desk.folder / "backup.md").write_text(template)
    body = {
        "title": "Backup of __all__",
        "host": "db-1",
        "url": "https://backup.example.org/17",
        "startedAt": "2026-11-29T02:00:00Z",
        "files": [{"name": "a*b*c", "error": "<disk> " + "full " * 40}],
    }
    (desk.folder / "request.json").write_text(json.dumps(body))
    command = make.command.replace("'!ops:example.org'", desk.room.id).replace("backup.md", f"{desk.folder}/backup.md")
    made = run(*command.split()[1:], **desk.settings)
    assert made.returncode == 0, made.stderr
    (printed,) = [line for line in made.stdout.splitlines() if line.startswith("http")]
    url = f"{desk.bridge}/hooks/{printed.partition('/hooks/')[2]}"
    preview = run("hooks", "preview", "backup", f"{desk.folder}/request.json", **desk.settings)
    assert "Backup of __all__ on db-1, log (https://backup.example.org/17)" in preview.stdout, preview.stderr
    assert httpx.post(url, json=body, trust_env=False).status_code == 200
    assert httpx.post(url, json={**body, "files": []}, trust_env=False).status_code == 200
    some, none = desk.wait_for(2, before)
    assert some["content"]["formatted_body"].startswith(
        "<p><strong>Backup of __all__</strong> on <code>db-1</code>, "
        '<a href="https://backup.example.org/17">log</a></p>\n<ul>\n<li>a*b*c: &lt;disk&gt; full full'
    )
    assert some["content"]["body"].endswith("full…")
    assert none["content"]["body"].endswith("since 2026-11-29 02:00 UTC")
    # One that fails costs nothing but itself.
    assert httpx.post(url, json={**body, "files": 5}, trust_env=False).status_code == 200
    (summary,) = desk.wait_for(1, before + 2)
    assert summary["content"]["body"].startswith("Backup of __all__ (https://backup.example.org/17)")
    failed = "line 2 of markdown: number is not iterable"  # noted about a second later: no request waits for it
    until(lambda: failed in run("hooks", "show", "backup", **desk.settings).stdout)
