"""The `simvlm` command: parse, call, print."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from simvlm.kernels.dispatch import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # These commands' options are their settings' fields, which another parser knows.
    own, settings = (argv[:1], argv[1:]) if argv[:1] and argv[0] in ("pretrain", "finetune", "eval") else (argv, [])
    arguments = _parser().parse_args(own)
    arguments.settings = settings
    try:
        output = arguments.run(arguments)
    except (OSError, ValueError) as error:  # what a user can mend; anything else is a bug and shows its traceback
        print(f"simvlm {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"simvlm {arguments.command}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return 130
    print(output)
    return 0


class _Parser(argparse.ArgumentParser):
    """Offers the nearest names for an option that is none; subcommands' parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if found:
            message += did_you_mean(found[1], sorted(_options(self)))
        super().error(message)


def _options(parser: argparse.ArgumentParser) -> set[str]:
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names = names.union(*(_options(sub) for sub in action.choices.values()))
    return names


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="simvlm", description="Fast prefix attention and the SimVLM model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what runs on this machine, and what is missing for the rest")
    doctor.add_argument("--variants", action="store_true", help="the model's sizes and their parameter counts instead")
    doctor.set_defaults(run=_doctor)

    data = commands.add_parser("data", help="shards: indices, a report, a tokenizer, the generated world")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    world = actions.add_parser("world", help="write pictures, captions and documents as shards")
    world.add_argument("folder")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--pairs", type=int, default=60_000, help="pictures with captions (default: %(default)s)")
    world.add_argument("--documents", type=int, default=20_000, help="texts without a picture (default: %(default)s)")
    world.add_argument("--image-size", type=int, default=64, help="side in pixels (default: %(default)s)")
    world.add_argument("--sentences", action="store_true", help='half of the captions are sentences, "The star is red"')
    world.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    world.set_defaults(run=_data_world)
    benchmarks = actions.add_parser("benchmarks", help="write the world's benchmarks in the official formats")
    benchmarks.add_argument("folder")
    benchmarks.add_argument("--seed", type=int, default=0)
    benchmarks.add_argument("--scale", type=float, default=1.0, help="of all sizes (default: %(default)s)")
    benchmarks.add_argument("--image-size", type=int, default=64, help="side in pixels (default: %(default)s)")
    benchmarks.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    benchmarks.set_defaults(run=_data_benchmarks)
    tokenizer = actions.add_parser("tokenizer", help="train SentencePiece on the texts of shards")
    tokenizer.add_argument("path", help="where the model is written")
    tokenizer.add_argument("--pairs", nargs="+", help="tar shards: paths, globs, {00..31}")
    tokenizer.add_argument("--documents", nargs="+", help="jsonl, json.gz or parquet shards")
    tokenizer.add_argument("--folder", help="of the index files (default: beside the shards)")
    tokenizer.add_argument("--vocab-size", type=int, default=32_000, help="pieces (default: %(default)s)")
    tokenizer.set_defaults(run=_data_tokenizer)

    shards = "tar shards or documents: paths, globs, {00..31}"
    index = actions.add_parser("index", help="scan shards once, so that no run has to")
    index.add_argument("pattern", nargs="+", metavar="PATTERN", help=shards)
    index.add_argument("--folder", help="of the index files (default: beside the shards)")
    index.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    index.set_defaults(run=_data_index)
    report = actions.add_parser("report", help="read every sample: counts, sizes, lengths, hashes, what is broken")
    report.add_argument("pattern", nargs="+", metavar="PATTERN", help=shards)
    report.add_argument("--folder", help="of the index files (default: beside the shards)")
    report.add_argument("--tokenizer", metavar="MODEL", help="count tokens too")
    report.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    report.add_argument(
        "--max-broken", type=float, default=0.05, metavar="SHARE", help="fail above it (default: %(default)s)"
    )
    report.add_argument("--out", metavar="FILE", help="write it as JSON too")
    report.set_defaults(run=_data_report)

    pretrain = commands.add_parser("pretrain", help="train on image-text pairs and documents (--help: all settings)")
    pretrain.set_defaults(run=_pretrain)

    export = commands.add_parser("export", help="the model of a run's checkpoint as a folder of its own")
    export.add_argument("source", metavar="RUN", help="the run's folder, or that of one of its checkpoints")
    export.add_argument("folder", metavar="FOLDER", help="where the model goes")
    export.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    export.add_argument("--ema", action="store_true", help="the weights' average (of a run with --ema)")
    export.set_defaults(run=_export)

    finetune = commands.add_parser("finetune", help="train a model on one benchmark (--help: all settings)")
    finetune.set_defaults(run=_finetune)
    evaluate = commands.add_parser("eval", help="score a model or predictions on one benchmark (--help: all settings)")
    evaluate.set_defaults(run=_eval)

    reproduce = commands.add_parser("reproduce", help="run the paper's experiments, from where they stopped")
    reproduce.add_argument("--scale", default="demo", help="demo, small or base (default: %(default)s)")
    reproduce.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="of the table (default: all)")
    reproduce.add_argument("--out", default="runs/reproduce", help="results (default: %(default)s)")
    reproduce.add_argument("--work", default="runs/reproduce", help="checkpoints and data (default: %(default)s)")
    reproduce.add_argument("--data", default="", help="pairs/ documents/ tokenizer.model benchmarks/ (demo: generated)")
    reproduce.add_argument("--workers", type=int, default=1, help="jobs at a time (default: %(default)s)")
    reproduce.add_argument("--share", type=float, default=1.0, help="of the generated data (default: %(default)s)")
    reproduce.add_argument("--show", action="store_true", help="print the commands and run none")
    reproduce.add_argument("--page", action="store_true", help="write the page of the results that are there, run none")
    reproduce.set_defaults(run=_reproduce)

    caption = commands.add_parser("caption", help="write a caption for each picture")
    caption.add_argument("images", nargs="+", metavar="IMAGE")
    caption.add_argument("--model", default="runs/demo/checkpoint", help="its folder (default: %(default)s)")
    caption.add_argument("--prompt", default="A picture of", help="the caption goes on from it (default: %(default)s)")
    caption.add_argument("--begin", default="", help="the caption begins with it: in another language, say")
    caption.add_argument("--max-len", type=int, default=60, help="tokens at the most (default: %(default)s)")
    search = caption.add_mutually_exclusive_group()
    search.add_argument("--beam", type=int, default=4, help="hypotheses; 1 is greedy (default: %(default)s)")
    search.add_argument("--sample", action="store_true", help="draw each word instead of searching")
    caption.add_argument("--temperature", type=float, default=1.0, help="of --sample (default: %(default)s)")
    caption.add_argument("--seed", type=int, default=0, help="of --sample (default: %(default)s)")
    caption.set_defaults(run=_caption)

    plan = commands.add_parser("tpu-plan", help="compile the training step for a TPU slice, without a TPU")
    plan.add_argument("--variant", default="base", help="a size by name (default: %(default)s)")
    plan.add_argument("--topology", default="v3:16x32", help="generation and chips (default: %(default)s, the paper's)")
    plan.add_argument("--image-text-batch", type=int, default=4096, help="pairs a step (default: %(default)s)")
    plan.add_argument("--text-batch", type=int, default=512, help="documents a step (default: %(default)s)")
    plan.add_argument("--caption-tokens", type=int, default=64, help="of every caption (default: %(default)s)")
    plan.add_argument("--document-tokens", type=int, default=256, help="of every document (default: %(default)s)")
    plan.add_argument(
        "--mesh", help="devices along data, fsdp and tensor, as 64,8,2 (default: chips/4,4,cores of a chip)"
    )
    plan.add_argument("--remat", choices=("none", "layer", "dots"), default="layer", help="(default: %(default)s)")
    plan.add_argument("--accumulate", type=int, default=1, help="micro-batches a step (default: %(default)s)")
    plan.add_argument("--impl", choices=("xla", "pallas"), default="xla", help="kernels (default: %(default)s)")
    plan.add_argument("--quick", action="store_true", help="a compiler that optimizes less, in less than half the time")
    plan.add_argument("--save-hlo", metavar="FOLDER", help="keep the compiled program's text")
    plan.add_argument("--compare", nargs="+", default=[], metavar="TOPOLOGY", help="a table with these beside it")
    plan.add_argument("--json", action="store_true", help="numbers with their units, for a program to read")
    plan.set_defaults(run=_tpu_plan)

    demo = commands.add_parser("demo", help="learn to caption from nothing, in minutes, and show it on a page")
    demo.add_argument(
        "action", nargs="?", choices=("run", "score"), default="run", help="score: judge its captions again"
    )
    demo.add_argument("--minutes", type=float, default=12.0, help="of training (default: %(default)s)")
    demo.add_argument("--out", default="runs/demo", help="its folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _doctor(arguments: argparse.Namespace) -> str:
    from simvlm import doctor

    return doctor.variants() if arguments.variants else doctor.report()


def _data_world(arguments: argparse.Namespace) -> str:
    from simvlm.data.commands import data_world

    names = ("seed", "pairs", "documents", "image_size", "sentences", "workers")
    return data_world(arguments.folder, **{name: getattr(arguments, name) for name in names})


def _data_benchmarks(arguments: argparse.Namespace) -> str:
    from simvlm.tasks.commands import data_benchmarks

    options = {name: getattr(arguments, name) for name in ("seed", "scale", "image_size", "workers")}
    return data_benchmarks(arguments.folder, **options)


def _data_tokenizer(arguments: argparse.Namespace) -> str:
    from simvlm.data.commands import data_tokenizer

    if not (arguments.pairs or arguments.documents):
        raise ValueError("data tokenizer: --pairs or --documents must name the texts, got neither")
    options = {name: getattr(arguments, name) for name in ("pairs", "documents", "folder", "vocab_size")}
    return data_tokenizer(arguments.path, **options)


def _data_index(arguments: argparse.Namespace) -> str:
    from simvlm.data.commands import data_index

    return data_index(arguments.pattern, folder=arguments.folder, workers=arguments.workers)


def _data_report(arguments: argparse.Namespace) -> str:
    from simvlm.data.commands import data_report

    options = {name: getattr(arguments, name) for name in ("folder", "tokenizer", "workers", "max_broken", "out")}
    return data_report(arguments.pattern, **options)


def _pretrain(arguments: argparse.Namespace) -> str:
    from simvlm.train.pretrain import main as pretrain

    return pretrain(arguments.settings)


def _export(arguments: argparse.Namespace) -> str:
    from simvlm.train.export import export

    return export(arguments.source, arguments.folder, step=arguments.step, ema=arguments.ema)


def _finetune(arguments: argparse.Namespace) -> str:
    from simvlm.tasks.commands import finetune

    return finetune(arguments.settings)


def _eval(arguments: argparse.Namespace) -> str:
    from simvlm.tasks.commands import evaluate

    return evaluate(arguments.settings)


def _reproduce(arguments: argparse.Namespace) -> str:
    from simvlm.tasks.commands import reproduce

    options = {name: getattr(arguments, name) for name in ("scale", "rows", "data", "workers", "share", "show", "page")}
    return reproduce(arguments.out, arguments.work, **options)


def _caption(arguments: argparse.Namespace) -> str:
    from simvlm.model.caption import caption
    from simvlm.model.generate import Sampling

    sample = Sampling(temperature=arguments.temperature, seed=arguments.seed) if arguments.sample else None
    options = {name: getattr(arguments, name) for name in ("prompt", "beam", "max_len", "begin")}
    texts, problems = caption(arguments.images, folder=arguments.model, sample=sample, **options)
    found = [(path, text) for path, text in zip(arguments.images, texts, strict=True) if text is not None]
    lines = [f"{path}: {' '.join(text.splitlines())}" for path, text in found]  # a line each, whatever was drawn
    if problems:
        print("\n".join(lines))
        raise ValueError("; ".join(problems))
    return "\n".join(lines)


def _tpu_plan(arguments: argparse.Namespace) -> str:
    import dataclasses

    from simvlm.train import tpu_plan

    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(tpu_plan.PlanSettings)}
    if arguments.mesh is not None:
        try:
            data, fsdp, tensor = map(int, arguments.mesh.split(","))
        except ValueError:
            raise ValueError(f"--mesh must be three numbers, as 64,8,2, got {arguments.mesh!r}") from None
        values["mesh"] = (data, fsdp, tensor)
    return tpu_plan.main(tpu_plan.PlanSettings(**values), arguments.compare, arguments.json)


def _demo(arguments: argparse.Namespace) -> str:
    from pathlib import Path

    from simvlm.demo import recipe

    out = Path(arguments.out)
    if arguments.action == "score":
        return recipe.score(out)
    return recipe.demo(out, minutes=arguments.minutes, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
