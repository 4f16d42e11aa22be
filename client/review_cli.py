"""The commands `consortium client review | approve | reject`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consortium.client.clock import WasAhead, check, latest_of, why_not
from consortium.client.options import Folder, Json, home_in

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from consortium.client.approvals import Approvals
    from consortium.client.home import Home
    from consortium.protocol.bundle import Bundle
    from consortium.protocol.connection import Connection

Name = Annotated[str, typer.Argument(metavar="STUDY", help="The study's name.")]
Data = Annotated[
    str, typer.Option("--data", help="The data set that it gets (the only one, if there is one).")
]
Bundled = Annotated[
    str, typer.Option("--bundle", help="Only the bundle whose SHA-256 begins so, as it was reviewed.")
]


def review(
    folder: Folder,
    name: Annotated[
        str, typer.Argument(metavar="[STUDY]", help="The study's name; all where left out.")
    ] = "",
    data: Data = "",
    as_json: Json = False,
) -> None:
    """Show what a study would run here: its code and what is new in it, what leaves, which data, for how long.

    Nothing of the study is run. Without a name: the studies that the server has, and what was decided about each.

    Example: consortium client review breast-cancer --dir site
    """
    from consortium.client import review as shown
    from consortium.client.approvals import decided
    from consortium.protocol.sandbox import describe

    desk = _Desk(folder)
    if not name:
        studies = [one | {"decision": decided(desk.last(one["bundle"]))} for one in desk.proposals()]
        if as_json:
            typer.echo(json.dumps({"studies": studies}))
            return
        for one in studies:
            typer.echo(f"{one['name']:<32} {one['bundle'][:16]}  {one['decision']}")
        if not studies:
            typer.echo("the server has no study yet")
        return
    bundle = desk.bundle(name)
    chosen, mapping = desk.data(data, must=False)
    before = desk.approvals.before(desk.key.public_key(), bundle)
    said = shown.document(bundle, before, chosen, mapping, describe())
    standing = decided(desk.last(bundle.digest))
    if as_json:
        typer.echo(json.dumps(said | {"decision": standing}))
        return
    typer.echo(shown.page(said, standing))
    typer.echo(f"\nNext: consortium client approve {name} --bundle {bundle.digest[:16]} --dir {folder}")
    typer.echo(f"      consortium client reject {name} --reason TEXT --dir {folder}")


def approve(
    name: Name,
    folder: Folder,
    bundled: Bundled = "",
    data: Data = "",
    rounds: Annotated[int | None, typer.Option(help="The most rounds of a run (the study's).")] = None,
    days: Annotated[float, typer.Option(help="How long this holds.")] = 30.0,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="The most epsilon that this study may spend of the data, all its runs together (the data's budget)."
        ),
    ] = None,
    unconfined: Annotated[
        bool,
        typer.Option("--without-sandbox", help="Let its code run although this machine has no sandbox."),
    ] = False,
    clock_was_ahead: WasAhead = False,
    as_json: Json = False,
) -> None:
    """Approve a study as it is now, byte for byte, for this site; it counts at once. `review` it first.

    Example: consortium client approve breast-cancer --data patients --days 14 --dir site
    """
    from consortium.client.approvals import made
    from consortium.protocol.errors import InputError

    desk = _Desk(folder)
    now, latest = time.time(), latest_of(desk.home, desk.approvals.entries(desk.key.public_key()))
    check(now, latest, clock_was_ahead, f"study '{name}' is not approved")
    bundle = desk.bundle(name)
    if not bundle.digest.startswith(bundled.lower()):
        raise InputError(
            f"study '{name}': the server's bundle is {bundle.digest[:16]} now, not {bundled[:64]}; review it: "
            f"consortium client review {name} --dir {folder}"
        )
    bundle.check_needs()
    chosen, _ = desk.data(data, must=True)
    most = bundle.study.rounds if rounds is None else rounds
    ahead = latest if why_not(now, latest) else 0.0
    approval = made(
        desk.home, bundle, chosen, rounds=most, days=days, now=now, epsilon=epsilon, unconfined=unconfined,
        clock=ahead,
    )  # fmt: skip
    desk.approvals.approve(desk.key, bundle, approval, now)
    desk.tell()
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "study": name,
                    "bundle": bundle.digest,
                    "data": chosen,
                    "expires": approval.expires,
                    "epsilon": approval.epsilon,
                }
            )
        )
        return
    until = time.strftime("%Y-%m-%d", time.localtime(approval.expires))
    limit = f", epsilon {epsilon:g} in all" if epsilon is not None else ""
    typer.echo(f"study {name}: approved over data '{chosen}', {most} rounds a run{limit}, until {until}")
    typer.echo(f"bundle       {bundle.digest}")
    typer.echo(f"\nTo take it back: consortium client reject {name} --reason TEXT --dir {folder}")


def reject(
    name: Name,
    folder: Folder,
    reason: Annotated[str, typer.Option(help="Why; the study's admin reads it.")],
    as_json: Json = False,
) -> None:
    """Say no to a study, or take an approval of it back. The reason goes to the admin, not to other sites.

    Example: consortium client reject breast-cancer --reason opens-files --dir site
    """
    desk = _Desk(folder)
    bundle = desk.bundle(name)
    desk.approvals.reject(desk.key, bundle, reason, time.time())
    desk.tell()
    if as_json:
        typer.echo(json.dumps({"study": name, "bundle": bundle.digest, "rejected": True}))
        return
    typer.echo(f"study {name}: rejected")


class _Desk:
    """The site's keys and decisions, and a connection to the server."""

    def __init__(self, folder: Path) -> None:
        from consortium.client.approvals import Approvals

        self.home: Home = home_in(folder)
        lock = self.home.lock()
        self.key: Ed25519PrivateKey = self.home.identity(lock)
        self.approvals: Approvals = Approvals(self.home)
        self._connection: Connection = self.home.connection(lock)
        self._found: dict[str, Any] | None = None

    def proposals(self) -> list[dict[str, Any]]:
        """The studies that the server has; our decisions are at least what it has seen of them."""
        from consortium.client import proposals

        if self._found is None:
            self._found = proposals.fetch(self._connection, self.approvals)
        return list(self._found["studies"])

    def bundle(self, name: str) -> Bundle:
        """The bundle of the study of that name."""
        from consortium.client import proposals
        from consortium.protocol.errors import InputError, nearest

        known = {one["name"]: one for one in self.proposals()}
        if name not in known:
            raise InputError(
                f"the server has no study '{name}'{nearest(name, known)}; see: consortium client review"
            )
        return proposals.bundle(self._connection, known[name])

    def last(self, digest: str) -> Any:
        """The decision about a bundle."""
        return self.approvals.last(self.key.public_key(), digest)

    def data(self, name: str, must: bool) -> tuple[str, dict[str, Any]]:
        """The name and mapping of the data set that was chosen, or of the only one."""
        from consortium.client.datasets import Datasets
        from consortium.protocol.errors import InputError

        sets = Datasets(self.home)
        if not name:
            every = sets.all()
            if len(every) != 1:
                if must:
                    known = (
                        ", ".join(one.name for one in every) or "none yet; see: consortium client data add"
                    )
                    raise InputError(f"--data: say which data set it gets: {known}")
                return "", {}
            name = every[0].name
        return name, sets.get(name).mapping()

    def tell(self) -> None:
        """Send the server what was decided; where it cannot be reached, the agent does so later."""
        from consortium.client import proposals
        from consortium.protocol.connection import UnreachableError

        try:
            proposals.send(self._connection, self.approvals)
        except UnreachableError as error:
            typer.echo(f"kept here; the agent tells the server when it is connected ({error})", err=True)
