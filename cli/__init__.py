"""The verbs: one file a subcommand. Nothing here imports torch before a command runs."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from ..core.errors import SctoolError
from .annotate import annotate
from .bench import app as bench
from .compare import compare
from .distill import distill
from .evaluate import evaluate
from .exchange import export, import_
from .merge import merge
from .methods import methods
from .options import Command
from .prepare import prepare
from .sample import sample
from .train import train
from .weights import app as weights

app = typer.Typer(
    name="sctool",
    help="Adapt and control diffusion models with few parameters on a frozen base.",
    epilog="Start here: sctool train --method scedit --cond canny, then sctool sample, then sctool evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
for command in (annotate, prepare, train, distill, merge, import_, export, sample, evaluate, compare, methods):
    name, needs_words = command.__name__.removesuffix("_"), command in (annotate, prepare, merge, import_, export)
    app.command(name, cls=Command, no_args_is_help=needs_words)(command)
app.add_typer(bench, name="bench")
app.add_typer(weights, name="weights")


def _version(wanted: bool) -> None:
    if wanted:
        from sctool import __version__

        print(f"sctool {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["SCTOOL_DEBUG"] = "1"


def main() -> None:
    """The `sctool` command: a user's fault ends with one clear message and exit code 2 or 1, never a traceback."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    try:
        code = app(arguments, prog_name="sctool", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SctoolError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; the same command again goes on from what was finished.", 130)
    except BrokenPipeError:
        return 141
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong word, told by the command-line library
            error.show()
            return error.exit_code
        return _fail(
            f"unexpected {type(error).__name__}: {error}. Run again with `sctool --debug ...` to see where.", 1
        )


def _fail(message: str, code: int) -> int:
    if os.environ.get("SCTOOL_DEBUG"):
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code
