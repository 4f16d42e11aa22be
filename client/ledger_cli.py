"""The commands `consortium client ledger ...`: what this site's data have spent of privacy, and what they may."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consortium.client.clock import WasAhead, check, latest_of
from consortium.client.options import Folder, Json, home_in
from consortium.protocol.cli import group
from consortium.protocol.errors import InputError

if TYPE_CHECKING:
    from consortium.privacy.ledger import Account

ledger = group()

Delta = Annotated[float, typer.Option("--delta", help="The delta at which epsilon is given.")]


@ledger.callback()
def _ledger() -> None:
    """Show and check what each data set has spent of privacy in all studies, and set its budget.

    Example: consortium client ledger show --dir site
    """


@ledger.command()
def show(folder: Folder, delta: Delta = 1e-5, as_json: Json = False) -> None:
    """What each data set has spent, for each unit, and its budget.

    Example: consortium client ledger show --dir site
    """
    from consortium.client.charges import checked, ledger_in

    home = home_in(folder)
    book = ledger_in(home, home.lock())
    checked(home, book)
    found = [_document(account, delta) for _, account in sorted(book.accounts().items())]
    if as_json:
        typer.echo(json.dumps({"head": book.head.text, "data": found}))
        return
    for one in found:
        _print(one)
    if not found:
        typer.echo("nothing is spent, and no budget is set")


@ledger.command()
def budget(
    name: Annotated[str, typer.Argument(help="The data set.")],
    epsilon: Annotated[float, typer.Option("--epsilon", help="What it may spend in all studies together.")],
    folder: Folder,
    delta: Delta = 1e-5,
    unit: Annotated[str, typer.Option("--unit", help="record, person or site.")] = "record",
    clock_was_ahead: WasAhead = False,
) -> None:
    """Set what a data set may spend, in place of what was set before. What it has spent already counts.

    A study that would pass it is declined from then on, and so is every study without differential privacy.

    Example: consortium client ledger budget patients --epsilon 8 --dir site
    """
    from consortium.client.audit import noted
    from consortium.client.charges import ledger_in
    from consortium.client.datasets import Datasets
    from consortium.privacy.ledger import RELATIONS, Budget

    if unit not in RELATIONS:
        raise InputError(f"--unit: got {unit!r}; record, person or site would be right")
    home = home_in(folder)
    home.config  # noqa: B018 - refuses a folder that is no client's
    Datasets(home).get(name)
    allowed = Budget(epsilon, delta, unit)
    book = ledger_in(home, home.lock())
    now = time.time()
    check(now, latest_of(home, book.entries()), clock_was_ahead, f"data {name}: its budget is not set")
    book.allow(name, allowed, now)
    about = {"data": name, "epsilon": epsilon, "delta": delta, "unit": unit, "ledger": book.head.text}
    noted(home, "budget", about | ({"clock_was_ahead": True} if clock_was_ahead else {}))
    typer.echo(
        f"data {name}: may spend epsilon {epsilon:g} at delta {delta:g} per {unit}, in all studies together"
    )


@ledger.command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check every entry, and that nothing is missing of what the server has seen. Exit code 4 where something is.

    The server is asked where it can be reached; else what it countersigned last is compared.

    Example: consortium client ledger verify --dir site
    """
    from consortium.client.charges import checked, ledger_in
    from consortium.client.charges import show as show_to
    from consortium.protocol.connection import UnreachableError

    home = home_in(folder)
    lock = home.lock()
    book = ledger_in(home, lock)
    head = checked(home, book)
    asked = True
    try:
        connection = home.connection(lock, timeout=10.0)
        try:
            show_to(home, book, connection)
        finally:
            connection.close()
    except UnreachableError:
        asked = False
    by = "the server of now" if asked else "what the server countersigned last (it cannot be reached now)"
    if as_json:
        typer.echo(json.dumps({"entries": head.sequence, "head": head.text, "server_asked": asked}))
        return
    typer.echo(f"sound: {head.sequence} entries, compared with {by}")


@ledger.command()
def export(
    folder: Folder, out: Annotated[Path, typer.Option("--out", help="A new file (JSON lines).")]
) -> None:
    """Write every entry, as it is signed, into a file, for an auditor.

    Example: consortium client ledger export --out ledger.jsonl --dir site
    """
    from consortium.client.charges import checked, ledger_in

    home = home_in(folder)
    book = ledger_in(home, home.lock())
    head = checked(home, book)
    if out.exists():
        raise InputError(f"{out}: is there already; give a new file")
    out.write_bytes(book.path.read_bytes() if book.path.exists() else b"")
    typer.echo(f"{out}: {head.sequence} entries of '{book.name}'")


def _document(account: Account, delta: float) -> dict[str, Any]:
    from consortium.privacy.ledger import RELATIONS

    spent = {unit: account.spent(unit, delta).document() for unit in RELATIONS}
    limit = account.budget
    allowed = None if limit is None else {"epsilon": limit.epsilon, "delta": limit.delta, "unit": limit.unit}
    left = None
    if limit is not None:
        used = account.spent(limit.unit, limit.delta).epsilon
        left = max(0.0, limit.epsilon - used)
    return {
        "data": account.data, "releases": len(account.charges), "spent": spent, "budget": allowed, "left": left,
        "unbounded_by": list(account.unbounded),
    }  # fmt: skip


def _print(one: dict[str, Any]) -> None:
    typer.echo(f"data {one['data']}: {one['releases']} releases")
    for unit, spent in one["spent"].items():
        epsilon = "not bounded" if spent["epsilon"] is None else f"epsilon {spent['epsilon']:.3f}"
        typer.echo(
            f"  per {unit:7} {epsilon} at delta {spent['delta']:g} ({spent['relation']}; {spent['sampling']}; "
            f"{spent['accountant']})"
        )
    if one["budget"] is None:
        typer.echo(
            f"  budget      none; to set one: consortium client ledger budget {one['data']} --epsilon E --dir DIR"
        )
    else:
        allowed = one["budget"]
        typer.echo(
            f"  budget      epsilon {allowed['epsilon']:g} at delta {allowed['delta']:g} per {allowed['unit']}; "
            f"left {one['left']:.3f}"
        )
    if one["unbounded_by"]:
        typer.echo(f"  unbounded   by runs without differential privacy: {', '.join(one['unbounded_by'])}")
