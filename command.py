"""The command line of a script: flags that all share, --config, and exit codes that are real."""
import argparse
import contextlib
import difflib
import importlib.util
import json
import math
import os
import re
import signal
import sys
import traceback

import torch.distributed as dist

from files import expanded, one_line, refuse_unusable, UserError

# Beside Ctrl-C. A closed terminal sends the second, if nohup did not say to ignore it.
STOPS = [signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOPS.append(signal.SIGHUP)


def number(least=0.0, most=math.inf, above=False, read=float):
    """An argparse type: a finite number from `least` (or above it) to `most`."""
    def checked(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = read(str(text))
            if least <= value <= most and math.isfinite(value) and not (above and value == least):
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected {'a whole' if read is int else 'a'} number "
            f"{'above' if above else 'from'} {least} to {most}")
    return checked


def whole(least=0, most=2 ** 31 - 1):
    """An argparse type: a whole number from `least` to `most`."""
    return number(least, most, read=int)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that exits with code 2 and one line. --flag_name is understood, and so are
    `aliases` {"--theirs": "--ours"}; `refused` {"--theirs": "use this"} and short forms are not."""
    def __init__(self, *args, aliases=None, refused=None, **options):
        super().__init__(*args, allow_abbrev=False, **options)
        self.aliases = aliases or {}
        self.refused = {"--local-rank": "torchrun sets it", **(refused or {})}
        self.register("type", float, number())  # what a flag reads that asks for no narrower type
        self.register("type", int, whole())

    def error(self, message):
        self.exit(2, f"error: {one_line(message)} (--help lists the flags)\n")

    def parse_known_args(self, args=None, namespace=None):
        words = [self.spelled(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, odd = super().parse_known_args(words, namespace)
        config = getattr(parsed, "config", None)
        if getattr(parsed, "eval_only", False) and parsed.output_dir and not config:
            own = expanded(parsed.output_dir) / "config.json"  # a run is scored as it was trained
            config = str(own) if own.is_file() else None
        if config:
            words += self.words_of(config, words)
            parsed, odd = super().parse_known_args(words, namespace)
        if odd:
            near = closest(odd[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown argument {odd[0]}{near}")
        if hasattr(parsed, "resume"):
            refuse_early(parsed)
        return parsed, odd

    def spelled(self, word):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
            flag = self.aliases.get(flag, flag)
        if flag in self.refused:
            self.error(f"{flag} is not a flag here: {self.refused[flag]}")
        return flag + equals + value

    def words_of(self, path, words):
        """The flags of a config.json that `words` do not name, as words of a command line, so that
        argparse checks them like typed ones."""
        named = {word.partition("=")[0] for word in words}
        try:
            values = {**json.loads(expanded(path).read_text("utf-8"))}
        except (OSError, ValueError, TypeError) as error:
            self.error(f"--config {path} is not a run's config.json: {one_line(error)}")
        known, ran = {action.dest for action in self._actions} | {"script"}, "identity" in values
        if ran:  # what a preset fills in is no flag; those named here were of that run alone
            known |= {"identity", *self._defaults}
            named |= {"--config", "--resume", "--overwrite", "--debug", "--dry-run", "--export"}
        unknown = min(values.keys() - known, default=None)
        if unknown:
            near = closest(unknown, known)
            self.error(f"--config {path}: {unknown!r} is no flag of this script{near}")
        told = []
        for action in self._actions:
            value, flags = values.get(action.dest), action.option_strings
            not_given = value is None or ran and value == [] and action.nargs == "+"
            if not_given or not flags or flags[-1] in named:
                continue
            items = value if isinstance(value, list) and action.nargs in ("+", "*") else [value]
            kinds = [bool] if action.nargs == 0 else [str, int, float]
            # A list's item with a dash would be taken for a flag.
            dash = len(items) > 1 and any(str(item).startswith("-") for item in items)
            if dash or any(type(item) not in kinds for item in items):
                self.error(f"--config {path}: {action.dest} is {value!r}; expected " + (
                    "true or false" if kinds == [bool] else "text or a number, without a dash"))
            if action.nargs == 0:
                told += flags[-1:] if value else []
            elif len(items) == 1:
                told.append(f"{flags[-1]}={items[0]}")
            else:
                told += [flags[-1], *map(str, items)]
        return told


def closest(name, known):
    return "".join(f"; is it {near}?" for near in difflib.get_close_matches(name, known, n=1))


def add_device_flags(add):
    """The flags of all that computes; add: the `add_argument` of a parser or group."""
    add("--device", default="auto", help="auto, cuda, cuda:N, npu, npu:N, mps or cpu")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="of matrix products; auto: bf16, else fp16, on an NVIDIA GPU; fp32 elsewhere")
    add("--workers", type=whole(-1), default=-1, help="processes that read images; -1 chooses")
    add("--debug", action="store_true", help="show tracebacks")


def add_run_flags(parser, log_every=20, several_seeds=False):
    """The flags that all scripts share."""
    add = parser.add_argument_group("the run").add_argument
    add_device_flags(add)
    several = {"nargs": "+", "default": [1]} if several_seeds else {"default": 1}
    add("--seed", type=whole(0, 2 ** 32 - 1), **several, help="(default: 1)")
    add("--config", metavar="FILE", help="take the flags of a run's config.json; those given here "
        "override them")
    add("--output-dir", default="", help="the run's folder (default: one under runs/)")
    add("--resume", default="auto", metavar="auto|none|PATH",
        help="go on from the folder's last checkpoint, or from the one at PATH")
    add("--overwrite", action="store_true", help="delete the run that the folder holds")
    add("--eval-only", action="store_true", help="score a checkpoint, train nothing")
    add("--dry-run", action="store_true", help="two steps of everything, in a folder of its own")
    add("--export", choices=["openai", "open_clip", "hf", "safetensors"],
        help="also write the trained model for this library")
    add("--tensorboard", action="store_true", help="what is logged, for TensorBoard too")
    add("--log-every", type=whole(1), default=log_every, help="steps between lines of the log")
    add("--save-every", type=whole(0), default=0, help="steps; 0: save at an epoch's end only")
    add("--deterministic", action="store_true", help="the same bits on a GPU, slower")


def refuse_early(args):
    """Raise UserError for what these flags alone say cannot be."""
    if args.resume not in ("auto", "none") and not expanded(args.resume).is_file():
        raise UserError(f"--resume {args.resume}: expected auto, none, or a checkpoint's path")
    if args.output_dir and not args.eval_only:
        refuse_unusable(expanded(args.output_dir))
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package: pip install tensorboard")


CHANGES_NO_RESULT = """device workers output_dir resume overwrite eval_only dry_run export
tensorboard log_every save_every debug config data_dir no_download deterministic micro_batch
cache_gb""".split()


def run_identity(args, but=(), **facts):
    """What must be equal for a run to be continued: every flag that changes a result and is not in
    `but`, and `facts`, which win: method, data (fingerprint), model, weights (sha256), ..."""
    return {key: value for key, value in {**vars(args), **facts}.items()
            if key in facts or key not in CHANGES_NO_RESULT and key not in but}


def run_folder(args, method, name):
    """--output-dir, or runs/METHOD/name; a dry run has its own beside it."""
    folder = expanded(args.output_dir or f"runs/{method}/{re.sub(r'[/:]+', '-', name)}")
    return folder.with_name(folder.name + "_dry_run") if args.dry_run else folder


def guard(main, get_args, argv=None):
    """`sys.exit(guard(main, get_args))`: run a script, turn what it raises into an exit code.

    0 done, 2 the user can fix it, 3 stopped safely (out of memory too), 128 + n by a signal,
    1 a bug: the only one that shows a traceback, unless --debug asks for it.
    """
    tolerate_any_locale()
    debug, code = "--debug" in (sys.argv[1:] if argv is None else argv), 0
    try:
        if os.environ.get("WORLD_SIZE", "") in ("", "0", "1"):
            on_signals(interrupt, *STOPS)  # a group's Python cannot answer while it waits
        main(get_args(argv))
        print(end="", flush=True)
    except (Exception, KeyboardInterrupt) as error:
        code, line = verdict(error)
        report(error, line, debug or code == 1)
    if dist.is_available() and dist.is_initialized():
        if code or argv is None:
            # After a failure others may be waiting for this process: it must not wait for them.
            # After success, ending the group races with their leaving: gloo's threads then abort.
            sys.stderr.flush()
            show("", end="")
            os._exit(code)
        dist.destroy_process_group()
    return code


def verdict(error):
    """What ended a script -> its exit code, and what to say of it."""
    text = one_line(error)
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        return 128 + number, f"interrupted by {number.name}; --resume auto goes on, if it can"
    if isinstance(error, BrokenPipeError) and not show(""):
        return 128 + 13, ""  # as if SIGPIPE had ended it, which is how `| head` ends programs
    if hasattr(error, "exit_code"):
        return error.exit_code, text
    # Each device has its own type or words for memory that ran out.
    if isinstance(error, MemoryError) or isinstance(error, (RuntimeError, OSError)) and re.search(
            "out of memory|allocate memory", text, re.I):
        return 3, (f"out of memory ({text[:150]}): a smaller --micro-batch gives the same result "
                   "in less, --precision bf16 halves most of it; what was saved before is intact")
    lost = "^DataLoader worker|closed by peer|reset by peer|Broken pipe"
    if isinstance(error, (BrokenPipeError, ConnectionResetError, dist.DistError)) or (
            isinstance(error, RuntimeError) and re.search(lost, text)):
        return 3, (f"a process that this one works with has ended ({text[:150]}): what it said "
                   "itself tells why; what was saved before is intact")
    return 1, ""


def report(error, line, debug):
    """Say what ended the run on stderr; an error that all processes share is said once."""
    rank, joined = os.environ.get("RANK", "0"), dist.is_available() and dist.is_initialized()
    if rank != "0" and (not joined or getattr(error, "shared", False)):
        return
    with contextlib.suppress(OSError):  # nobody reads it
        if debug:
            traceback.print_exception(error)
        if line:
            who = f"process {rank}: " if rank != "0" else ""
            print(f"{who}error: {line}", file=sys.stderr, flush=True)


def interrupt(number):
    """What STOPS do, as Ctrl-C: workers are stopped, a line is said. A second one kills."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)  # which no `except Exception` on the way swallows


def on_signals(answer, *numbers):
    """From now on these signals call answer(number) -> the handlers before, {number: handler}.
    Loader workers inherit this and do nothing: a signal is for their parent."""
    owner = os.getpid()

    def handle(number, frame):
        if os.getpid() == owner:
            answer(number)
    return {number: signal.signal(number, handle) for number in numbers}


def tolerate_any_locale():
    """A terminal that knows ASCII only shows \\u4e2d instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show(text, end="\n"):
    """Print -> whether somebody reads it. When `| head` has seen enough, the rest of stdout goes
    nowhere, and the run and its log go on."""
    try:
        print(text, end=end, flush=True)
        return True
    except (OSError, ValueError, AttributeError):  # or there is no console at all
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        return False
