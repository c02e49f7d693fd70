"""The command line: a file a command, which is loaded when that command is run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

#: What each command is for. Its module adds its options to a parser (``add_options``) and runs it (``run``).
COMMANDS = {
    "segment": "label every pixel of pictures",
    "demo": "segment one picture, with speed and parity beside it",
    "bench": "time plain torch, torch.compile and the fused kernels side by side",
    "export": "write the network as ONNX",
    "dump": "write the machine code of a fused op, and what a launcher needs to run it",
    "tune": "measure on your GPU how each layer runs fastest, and keep it",
    "train": "learn from labelled pictures",
    "evaluate": "score weights on labelled pictures",
    "info": "versions, compiler, instruction sets, backends",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 where all went well, 1 where some of the work failed, 2 where none could be done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv).parse_args(argv)
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


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Knows every command by name, and the options of the one that ``argv`` names."""
    parser = argparse.ArgumentParser(
        prog="fastscnn_fast", description="Fast-SCNN with fused inference kernels."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name == named:
            module = import_module(f".{name}", __name__)
            module.add_options(command)
            command.set_defaults(run=module.run)
    return parser
