"""The `simvlm` command: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="simvlm", description="Fast prefix attention and the SimVLM model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what runs on this machine, and what is missing for the rest")
    doctor.set_defaults(run=_doctor)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from simvlm.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
