"""The `simvlm` command: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # pretrain's options are its settings' fields, which another parser knows.
    own, settings = (argv[:1], argv[1:]) if argv[:1] == ["pretrain"] else (argv, [])
    arguments = _parser().parse_args(own)
    arguments.settings = settings
    try:
        print(arguments.run(arguments))
    except (OSError, ValueError) as error:  # what a user can mend; anything else is a bug and shows its traceback
        print(f"simvlm {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simvlm", description="Fast prefix attention and the SimVLM model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what runs on this machine, and what is missing for the rest")
    doctor.add_argument("--variants", action="store_true", help="the model's sizes and their parameter counts instead")
    doctor.set_defaults(run=_doctor)

    data = commands.add_parser("data", help="the generated world, and a tokenizer for any text")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    world = actions.add_parser("world", help="write pictures, captions and documents as shards")
    world.add_argument("folder")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--pairs", type=int, default=60_000, help="pictures with captions (default: %(default)s)")
    world.add_argument("--documents", type=int, default=20_000, help="texts without a picture (default: %(default)s)")
    world.add_argument("--image-size", type=int, default=64, help="side in pixels (default: %(default)s)")
    world.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    world.set_defaults(run=_data_world)
    tokenizer = actions.add_parser("tokenizer", help="train SentencePiece on the texts of shards")
    tokenizer.add_argument("path", help="where the model is written")
    tokenizer.add_argument("--pairs", nargs="+", help="tar shards: paths, globs, {00..31}")
    tokenizer.add_argument("--documents", nargs="+", help="jsonl or jsonl.gz shards")
    tokenizer.add_argument("--vocab-size", type=int, default=32_000, help="pieces (default: %(default)s)")
    tokenizer.set_defaults(run=_data_tokenizer)

    pretrain = commands.add_parser("pretrain", help="train on image-text pairs and documents (--help: all settings)")
    pretrain.set_defaults(run=_pretrain)
    return parser


def _doctor(arguments: argparse.Namespace) -> str:
    from simvlm import doctor

    return doctor.variants() if arguments.variants else doctor.report()


def _data_world(arguments: argparse.Namespace) -> str:
    from simvlm.data.commands import data_world

    options = {name: getattr(arguments, name) for name in ("seed", "pairs", "documents", "image_size", "workers")}
    return data_world(arguments.folder, **options)


def _data_tokenizer(arguments: argparse.Namespace) -> str:
    from simvlm.data.commands import data_tokenizer

    if not (arguments.pairs or arguments.documents):
        raise ValueError("data tokenizer: --pairs or --documents must name the texts, got neither")
    return data_tokenizer(
        arguments.path, pairs=arguments.pairs, documents=arguments.documents, vocab_size=arguments.vocab_size
    )


def _pretrain(arguments: argparse.Namespace) -> str:
    from simvlm.train.pretrain import main as pretrain

    return pretrain(arguments.settings)


if __name__ == "__main__":
    sys.exit(main())
