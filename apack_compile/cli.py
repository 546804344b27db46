"""The console script `apack-compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import apack_compile

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
plans = typer.Typer(no_args_is_help=True, add_completion=False, help="Plans that were saved.")
app.add_typer(plans, name="plan")

Folder = Annotated[
    Path | None, typer.Argument(metavar="MODEL_DIR", help="A local model folder. Default: the demo's model.")
]
Ratio = Annotated[float | None, typer.Option(help="Dense bytes over packed bytes. Default 4.")]
PresetName = Annotated[str | None, typer.Option(help="A preset, such as lossless, instead of a ratio.")]
CompileMode = Annotated[str, typer.Option("--compile", help="auto, inductor, aot_eager, eager or none.")]


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
    ratio: Ratio = None,
    preset: PresetName = None,
    images_per_prompt: Annotated[int, typer.Option(help="Pictures in each prompt.")] = 4,
    questions: Annotated[int, typer.Option(help="Questions in all.")] = 24,
    album: Annotated[int, typer.Option(help="Pictures of an album that many requests share; 0 for none.")] = 16,
    compile_: CompileMode = "auto",
    seed: Annotated[int, typer.Option(help="Which pictures and questions.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    png: Annotated[Path, typer.Option(help="Write the picture to this file.")] = Path("apack-demo.png"),
) -> None:
    """A small real model answers questions about real pictures, with a dense and with a packed cache."""
    from apack_compile.demo.run import DemoOptions, run_demo

    run_demo(DemoOptions(ratio, preset, images_per_prompt, questions, album, compile_, seed, json, png))


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


@app.command()
def calibrate(
    model: Folder = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A text, a picture, a .jsonl with text and images a line, or a folder of them; default with the demo's model."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.safetensors"),
    ratio: Annotated[float, typer.Option(help="Dense bytes over packed bytes.")] = 4.0,
    tokens: Annotated[
        int, typer.Option(help="Length of the prompts to come, and of the pieces that text is read in.")
    ] = 2_048,
    vision_share: Annotated[
        float | None, typer.Option(help="Share of vision tokens in them. Default: that of the data.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read no more than about so many tokens.")] = None,
) -> None:
    """Calibrates a model on your data and saves the plan."""
    from apack_compile.commands.calibrate import CalibrateOptions, run_calibrate

    run_calibrate(CalibrateOptions(model, data, output, ratio, tokens, vision_share, limit))


@plans.command("show")
def show(file: Annotated[Path, typer.Argument(help="A plan that was saved.")]) -> None:
    """Prints what a saved plan is for, and what each layer gets."""
    from apack_compile.commands.calibrate import show_plan

    for line in show_plan(file):
        typer.echo(line)


@app.command()
def bench(
    model: Folder = None,
    ratio: Ratio = None,
    preset: PresetName = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1_024,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate in each turn.")] = 16,
    compile_: CompileMode = "auto",
) -> None:
    """Times decode steps and counts bytes on this machine, dense and packed in turns."""
    from apack_compile.commands.bench import BenchOptions, run_bench

    run_bench(BenchOptions(model, ratio, preset, tokens, batch, new_tokens, compile_))


@app.command()
def ask(
    model: Folder = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture's file; may be repeated.")] = None,
    question: Annotated[
        str | None, typer.Option(help="What to ask. Default with the demo's model: one of its questions.")
    ] = None,
    ratio: Ratio = None,
    preset: PresetName = None,
    plan: Annotated[Path | None, typer.Option(help="A saved plan instead of a ratio.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    compile_: CompileMode = "none",
) -> None:
    """Answers a question about pictures from a packed cache, then shows the cache's bytes."""
    from apack_compile.commands.ask import AskOptions, run_ask

    run_ask(AskOptions(model, image or [], question, ratio, preset, plan, new_tokens, compile_))


def main() -> None:
    """Runs the command line; a known error is one line and exit code 2."""
    from apack_compile.demo.assets import DemoAssetsError

    try:
        app()
    except (ValueError, OSError, DemoAssetsError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
