"""The root command. Sub-commands are found through the entry-point group `consortium.commands` and loaded when used.

Every package has its own `cli.py` with typer functions or groups; importing one is cheap, what it runs is imported by
the function that runs. This module turns errors into exit codes, and nothing else.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click
import typer
from typer.main import get_command

from consortium.protocol.errors import ConsortiumError, nearest

GROUP = "consortium.commands"
SUMMARIES = {
    "client": "join a federation and take part from a site",
    "demo": "a whole federation on this machine, from certificates to a served model",
    "model": "verify, show and use an exported model",
    "server": "run the server of a federation",
    "simulate": "run a study on this machine, over files or a partitioned table",
    "strategies": "the strategies that a study can name, with parameters and papers",
    "study": "check a study file, run it in a federation, follow it",
}
"""One line a command for `--help`, here so that showing it loads no command."""


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class _Root(click.Group):
    """A group whose commands are entry points."""

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._points())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        points = self._points()
        if cmd_name not in points:
            ctx.fail(f"no such command '{cmd_name}'{nearest(cmd_name, points)} Try: consortium --help")
        return _command(cmd_name, points[cmd_name].load())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)])


def group() -> typer.Typer:
    """A group of commands, as all of ours are: without a command it shows its help; `main` tells errors."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _command(name: str, target: Any) -> click.Command:
    """A click command from a typer app or a plain function."""
    app = target
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name=name, context_settings={"help_option_names": ["-h", "--help"]})(target)
    command = get_command(app)
    command.name = name
    return command


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="consortium")
def root(debug: bool) -> None:
    """Federated learning between institutions that may not share their records.

    Start with: consortium demo
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with the code of `protocol.errors`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("CONSORTIUM_DEBUG") == "1"
    given = [argument for argument in given if argument != "--debug"]
    try:
        code = root.main(given, prog_name="consortium", standalone_mode=False)
    except click.exceptions.Abort:
        _exit("stopped", 130)
    except click.ClickException as error:
        error.show()
        raise SystemExit(2) from None
    except ConsortiumError as error:
        if debug:
            raise
        # Notes are for this terminal alone: names of files, words of a database.
        _exit("\n".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code)
    except KeyboardInterrupt:
        _exit("stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if debug:
            raise
        _exit(_fault(error), 1)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fault(error: Exception) -> str:
    """What to say of an error that nothing foresaw: a disk's is the operator's, any other is a fault of ours."""
    if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename or "a file"
        return f"{where}: {error.strerror}; correct that (room, permissions), then type the same again"
    return f"a fault in Consortium: {type(error).__name__}: {error}\nRun again with --debug and report it."


def _exit(message: str, code: int) -> None:
    click.echo(f"consortium: {message}", err=True)
    raise SystemExit(code)
