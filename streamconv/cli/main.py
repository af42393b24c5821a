"""The `streamconv` command: finds the verb and runs it. Only the verb that was typed is imported, so that `--help` shows at once."""

from __future__ import annotations

import importlib
import sys
from typing import cast

import click

from streamconv import __version__
from streamconv.arguments import check_words
from streamconv.cli import ending, output

VERBS = {
    "bench": ("bench", "Measure this machine: disks, kernels, conversions in cgroups."),
    "calibrate": ("measure", "Measure the activation ranges of a model on text."),
    "convert": ("conversion", "Convert a model: to TensorRT-LLM, or to a Hugging Face directory."),
    "diff": ("diff", "Compare two checkpoints tensor by tensor."),
    "finalize": ("outputs", "Publish an output whose parts are all done, by hand."),
    "inspect": ("inspect", "Show the tensors of a model, and what each would become."),
    "list": ("list_view", "Print the families, weight formats, or targets and their options."),
    "plan": ("conversion", "Show what convert would do, from the headers alone."),
    "push": ("outputs", "Upload a finished output to the Hugging Face Hub."),
    "status": ("outputs", "Show how far the work is that several machines share."),
    "submit": ("submit", "Print a job of Slurm or Kubernetes that does a conversion."),
    "verify": ("verify", "Check an output: structure, hashes; --source: every byte."),
}
"""Verb -> module of `cli` that has it, and its line in `streamconv --help`."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"streamconv.cli.{VERBS[cmd_name][0]}")
        return cast(click.Command, getattr(module, cmd_name if cmd_name != "list" else "list_"))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streamconv")
def cli() -> None:
    """Convert an LLM checkpoint in less memory than the model takes: to TensorRT-LLM, or to a quantized Hugging Face directory."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; gives the exit status and never raises for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv

    def command() -> int:
        check_words(arguments)
        return int(cli.main(arguments, prog_name="streamconv", standalone_mode=False, obj=arguments) or 0)

    return output.flush_or_fail(lambda: ending.status_of(command, "--json" in arguments))


def run() -> None:
    """The command: `main` for the arguments of this process."""
    ending.run(main)
