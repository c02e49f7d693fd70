"""The command line: a file a command, which is loaded when that command is run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .parser import Parser

#: What each command is for, under the headings of ``--help``. Its module adds its options to a parser
#: (``add_options``) and runs it (``run``).
COMMANDS = {
    "commands": {
        "segment": "label every pixel of pictures",
        "demo": "segment one picture, with speed and parity beside it",
        "train": "learn from labelled pictures",
        "prune": "make a trained network narrower and faster while it learns",
        "quantize": "measure the ranges that int8 needs, with scores and speed before and after",
        "evaluate": "score weights on labelled pictures",
        "app": "a page to try weights in a browser",
        "export": "write the network as ONNX",
        "info": "versions, compiler, instruction sets, backends, weights that come along",
    },
    "commands for work on the kernels": {
        "bench": "time plain torch, torch.compile and the fused kernels side by side",
        "tune": "measure on your GPU how each layer runs fastest, and keep it",
        "dump": "write the machine code of a fused op, and what a launcher needs to run it",
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 where all went well, 1 where some of the work failed, 2 where none could be done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args, rest = _parser(argv).parse_known_args(argv)
        if rest:
            args.error(f"unrecognized arguments: {shlex.join(rest)}")
        args.command_line = "python -m fastscnn_fast " + shlex.join(argv)
        status: int = args.run(args)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 1
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"fastscnn_fast: error: {reason}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"fastscnn_fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastscnn_fast: interrupted", file=sys.stderr)
        return 130
    return status


def _parser(argv: Sequence[str]) -> Parser:
    """Knows every command by name, and the options of the one that ``argv`` names; has looked at those in ``argv``."""
    parser = Parser(
        prog="fastscnn_fast",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Fast-SCNN with fused inference kernels.",
        epilog="Each command has --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    purposes = {name: purpose for names in COMMANDS.values() for name, purpose in names.items()}
    width = max(map(len, purposes))
    for title, names in COMMANDS.items():
        lines = [f"{name:{width}}  {purpose}" for name, purpose in names.items()]
        parser.add_argument_group(title, "\n".join(lines))
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", prog="fastscnn_fast", help=argparse.SUPPRESS
    )
    at = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    parser.check_options(argv[:at])
    for name in purposes:
        command = commands.add_parser(name)
        if argv[at : at + 1] == [name]:
            module = import_module(f".{name}", __name__)
            module.add_options(command)
            command.check_options(argv[at + 1 :])
            command.set_defaults(run=module.run, error=command.error)
    return parser
