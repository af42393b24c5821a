"""Commands about an output: how far the machines are that share the work, publishing it by hand, and uploading it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from streamconv.cli import output


@click.command()
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(out: str, as_json: bool) -> int:
    """Show how far the work on OUT is that several machines share: parts that are done, held by whom, and open."""
    from streamconv.cli.view import table

    work = _content(out)
    if as_json:
        output.dump(work)
        return 0
    if work["complete"]:
        output.line(f"{out}: the output is complete")
        return 0
    parts = [(str(part["part"]), part["holder"], str(part["tiles"])) for part in work["held"]]
    if parts:
        output.block([*table(parts, ("part", "held by", "tiles on the disk")), ""])
    begun = f" ({', '.join(map(str, work['left']))} begun by processes that are gone)" if work["left"] else ""
    output.line(f"{out}: {work['done']} of {work['parts']} parts are done, {len(parts)} held, {work['open']} open{begun}")
    if work["done"] == work["parts"]:
        output.line("all parts are done: the next worker publishes, or `streamconv finalize`")
    return 0


def _content(out: str) -> dict[str, Any]:
    from streamconv.publishing import work_on
    from streamconv.run.claims import Over

    claims = work_on(Path(out))
    if claims is None:
        return {"complete": True}
    done, locked, left = 0, [], []
    with contextlib.closing(claims):
        for part in range(claims.count):
            if claims.done(part):
                done += 1
                continue
            try:
                holder = claims.held(part)
            except Over:  # published since
                return _content(out)
            past = claims.journal(part).read()
            tiles = sum(map(len, past.tiles.values()))
            if holder is not None:
                locked.append({"part": part, "holder": holder, "tiles": tiles})
            elif past:
                left.append(part)
    facts = {"parts": claims.count, "done": done, "held": locked, "open": claims.count - done - len(locked), "left": left}
    return {"complete": False, "source": claims.plan_file["source"], **facts}


@click.command()
@click.argument("out")
@click.option("--verify", "check", is_flag=True, help="Read the output back first, and compare it with the hashes of the parts.")
@click.option("--no-lock", is_flag=True, help="Write even where the file system cannot lock a file; nobody else may be at work.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def finalize(out: str, check: bool, no_lock: bool, as_json: bool) -> int:
    """Publish OUT, whose parts are all done, by hand. The last worker does the same by itself."""
    from streamconv.publishing import finish

    finish(out, check=check, no_lock=no_lock)
    if as_json:
        output.dump({"out": out, "complete": True})
    else:
        output.line(f"{out}: the output is complete")
    return 0


@click.command()
@click.argument("out")
@click.argument("repo")
@click.option("--private", is_flag=True, help="If the repository is new, only you see it.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch; default: the main one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def push(out: str, repo: str, private: bool, revision: str | None, as_json: bool) -> int:
    """Upload the finished output OUT to REPO (org/name) on the Hugging Face Hub."""
    from streamconv.hub.push import push as upload

    where = upload(out, repo, private=private, revision=revision)
    if as_json:
        output.dump({"repo": repo, "revision": revision or "main", "url": where})
    else:
        output.line(where)
    return 0
