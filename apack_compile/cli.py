"""The console script `apack-compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import apack_compile

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"apack-compile {apack_compile.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Makes vision-language models decode with a small KV cache."""


@app.command()
def demo(
    ratio: Annotated[float | None, typer.Option(help="Dense bytes over packed bytes. Default 4.")] = None,
    preset: Annotated[str | None, typer.Option(help="A preset, such as lossless, instead of a ratio.")] = None,
    images_per_prompt: Annotated[int, typer.Option(help="Pictures in each prompt.")] = 4,
    questions: Annotated[int, typer.Option(help="Questions in all.")] = 48,
    compile_: Annotated[str, typer.Option("--compile", help="auto, inductor, aot_eager, eager or none.")] = "auto",
    seed: Annotated[int, typer.Option(help="Which pictures and questions.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    png: Annotated[Path, typer.Option(help="Write the picture to this file.")] = Path("apack-demo.png"),
) -> None:
    """A small real model answers questions about real pictures, with a dense and with a packed cache."""
    from apack_compile.demo.run import DemoOptions, run_demo

    run_demo(DemoOptions(ratio, preset, images_per_prompt, questions, compile_, seed, json, png))


@app.command()
def inspect(
    model: Annotated[
        Path | None, typer.Argument(help="A local model folder, or its config.json. Default: the demo's model.")
    ] = None,
) -> None:
    """Prints a model's layers, what would be packed, and what a ratio would give; reads no weights."""
    from apack_compile.demo.inspect import inspect_lines

    for line in inspect_lines(model):
        typer.echo(line)


def main() -> None:
    """Runs the command line; a known error is one line and exit code 2."""
    from apack_compile.demo.assets import DemoAssetsError

    try:
        app()
    except (ValueError, DemoAssetsError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
