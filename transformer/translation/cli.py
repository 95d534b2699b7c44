"""The command `fused-attention` (also `python -m fused_attention`): train, translate, quantize, demo, bench and others, which --help lists.

A user's error is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distributed import FailedElsewhere, PeerLost, Processes, joined, local_device, started_by_torchrun
from ..optional import optional_module
from .output_files import atomic_write, claim_output_folder, naming
from .terminal import heartbeat
from .training_config import RECIPES, TrainingConfig, read_settings

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint
    from .translate import Translator

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SETTINGS_NAME = "settings.toml"
EXPORTED_FILES = ENCODER, STEP, SOURCE_VOCABULARY, TARGET_VOCABULARY = "encoder.pt2", "decoder_step.pt2", "source.spm", "target.spm"
# Settings of TrainingConfig that are arguments of `train`, with their types; None stands for "as in the recipe".
TRAIN_SETTINGS = {
    **{name: int for name in ("vocab_size", "d_model", "num_heads", "num_encoder_layers", "num_decoder_layers")},
    **{name: int for name in ("dim_feedforward", "max_len", "max_words", "batch_tokens", "accumulate", "warmup_steps", "seed")},
    **{name: float for name in ("dropout", "embedding_dropout", "attention_dropout", "feed_forward_dropout", "residual_dropout")},
    **{name: float for name in ("layer_drop", "learning_rate_scale", "cooldown", "label_smoothing", "weight_decay")},
    **{name: int for name in ("checkpoint_every", "validate_every", "keep_last", "keep_best", "patience")},
    **{name: float for name in ("clip_norm",)},
    **{name: str for name in ("source_language", "target_language", "tokenizer", "memory_layers", "autocast", "parallel", "best_by")},
}
# Of these, what does not change the result, and may differ where a run is resumed.
RESUMABLE_SETTINGS = ("data", "accumulate", "parallel", "sharded_checkpoint")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    open_missing_streams()
    if arguments is None:
        restart_with_short_spinning()
    try:
        try:
            return run(arguments)
        finally:
            flush_stdout()
    except KeyboardInterrupt as error:
        return fail(str(error) or "interrupted", status=130)
    except BrokenPipeError:
        return 141
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except PeerLost as error:
        fail(str(error))
        os._exit(2)  # at once, for reasons that `joined` gives
    except FailedElsewhere:
        return 2  # the process where it failed says why
    except (ValueError, ImportError, RuntimeError) as error:
        return fail(str(error))


def run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    options, more = parser.parse_known_args(arguments)
    if more and options.command is not run_bench:
        parser.error(f"unknown arguments: {' '.join(more)}")
    options.bench_arguments = more
    return int(options.command(options) or 0)


def open_missing_streams() -> None:
    """Python has None in place of a standard stream that was closed before it started; give it one that is empty."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (stays open)


def flush_stdout() -> None:
    """Write out what was printed. Where that fails it is dropped, or Python would complain once more at exit. OSError."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "stdout") from error


def fail(message: str, status: int = 2) -> int:
    print(f"fused-attention: {' '.join(message.split())}", file=sys.stderr)
    return status


def restart_with_short_spinning() -> None:
    """Set GOMP_SPINCOUNT and start Python anew, once, unless the variable is set.

    libgomp reads it when torch loads it. Its default, spinning for milliseconds at every barrier, makes small operations tens of
    times slower when other processes want the same cores.
    """
    if sys.platform != "linux" or SPIN_VARIABLE in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ[SPIN_VARIABLE] = "2000"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fused-attention", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="this machine, and which attention backends run on it")
    info.set_defaults(command=run_info)

    train = commands.add_parser("train", help="train a translator on parallel text")
    train.add_argument("output", type=Path, help="folder for the checkpoint")
    train.add_argument("--data", help="corpus folder, multi30k or libreoffice-help (default: the recipe's); with --resume, where it is now")
    train.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file of settings, like the {SETTINGS_NAME} that a run writes")
    train.add_argument("--recipe", choices=sorted(RECIPES), help="settings to start from (default: multi30k)")
    budget = train.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="train for this many optimizer steps")
    budget.add_argument("--minutes", type=float, help="train for this long")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the checkpoint in OUTPUT with its settings")
    existing.add_argument("--overwrite", action="store_true", help="replace the checkpoint in OUTPUT")
    train.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    settings = train.add_argument_group("settings in place of the recipe's")
    for name, value_type in TRAIN_SETTINGS.items():
        settings.add_argument(f"--{name.replace('_', '-')}", type=value_type, metavar=value_type.__name__.upper())
    for name in ("norm_first", "joint_vocabulary", "sharded_checkpoint", "compile"):
        settings.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction)
    train.set_defaults(command=run_train)

    average = commands.add_parser("average", help="average the weights that a training has kept, into a checkpoint of its own")
    average.add_argument("folder", type=Path, help="where `train --keep-last N` or `--keep-best N` wrote")
    which = average.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, metavar="N", help="of the last N validations")
    which.add_argument("--best", type=int, metavar="N", help="of the best N validations")
    average.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the checkpoint")
    average.add_argument("--overwrite", action="store_true", help="replace the checkpoint in the folder")
    average.set_defaults(command=run_average)

    quantize = commands.add_parser("quantize", help="write a checkpoint with 8-bit weights, and compare translations before and after")
    quantize.add_argument("checkpoint", type=Path, help="checkpoint file, or a folder that `train`, `average` or `demo` wrote")
    quantize.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the checkpoint")
    quantize.add_argument("--overwrite", action="store_true", help="replace the checkpoint in the folder")
    quantize.add_argument("--dynamic", action="store_true", help="round the inputs of products to 8 bits as well")
    quantize.add_argument("--data", help="corpus to translate a test set of: a folder or a name (default: that of the training)")
    quantize.add_argument("--device", default="auto", help="for the translations: cpu, cuda, ... (default: a GPU if there is one)")
    quantize.set_defaults(command=run_quantize)

    translate = commands.add_parser("translate", help="translate the lines of stdin to stdout")
    add_model_arguments(translate)
    translate.add_argument("--beam", type=int, default=1, help="hypotheses of a sentence (default: 1, greedy)")
    caches = ("int8", "float8_e4m3fn", "float8_e5m2")
    translate.add_argument("--cache", choices=caches, help="keep keys and values of translations as 8-bit numbers, for less memory")
    translate.add_argument("--n-best", type=int, default=1, metavar="N", help="print the N best: line ||| translation ||| score")
    translate.add_argument("--scores", action="store_true", help="add the score of each translation, after a tab")
    translate.add_argument("--alignment", action="store_true", help="add the words that belong together, after |||: 0-0 1-2")
    translate.add_argument("--stream", action="store_true", help="translate line by line, at once (default: where stdin is a terminal)")
    translate.set_defaults(command=run_translate)

    score = commands.add_parser("score", help="log-probabilities of given translations, a line each")
    add_model_arguments(score)
    score.add_argument("--source", type=Path, required=True, help="file with a sentence a line")
    score.add_argument("--translation", type=Path, required=True, help="file with its translation a line")
    score.set_defaults(command=run_score)

    export = commands.add_parser("export", help="write the encoder and a step of the decoder as programs of torch.export")
    add_model_arguments(export)
    export.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=f"folder for {', '.join(EXPORTED_FILES)}")
    export.add_argument("--overwrite", action="store_true", help="replace earlier ones")
    export.set_defaults(command=run_export)

    demo = commands.add_parser("demo", help="train, translate and write a report, in one go")
    demo.add_argument("--task", choices=("translation", "digits"), default="translation", help="digits: classify images, in a minute")
    demo.add_argument("--minutes", type=float, help="training time (default: 4 on a CPU, 3 on a GPU)")
    demo.add_argument("--data", help="folder with an English-French corpus, multi30k or libreoffice-help (default: what can be had)")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder for report and checkpoint (default: demo)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier report and checkpoint")
    demo.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    demo.set_defaults(command=run_demo)

    compare = commands.add_parser("compare", help="compare the Transformer with recurrent models of the same size: speed and quality")
    compare.add_argument(
        "--grid", choices=("short", "full"), default="short", help="three minutes on a CPU, or an hour and a half (default: short)"
    )
    compare.add_argument("--minutes", type=float, help="training time of each model (default: 0.3, or 4 with --grid full)")
    compare.add_argument("--data", default="multi30k", help="folder with an English-French corpus, multi30k or libreoffice-help")
    compare.add_argument(
        "--output", type=Path, default=Path("compare"), help="folder for results and plots; if it has some, the comparison continues"
    )
    compare.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    compare.set_defaults(command=run_compare)

    bench = commands.add_parser(
        "bench", add_help=False, help="compare with other engines on this machine, in ten minutes; bench --help lists its arguments"
    )
    bench.set_defaults(command=run_bench)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("checkpoint", type=Path, nargs="?", help="checkpoint file, or a folder that `train` or `demo` wrote")
    which.add_argument("--model", type=Path, metavar="PATH", help="a Marian model: its folder, or the .npz or .bin file in it")
    which.add_argument("--pretrained", metavar="LANGUAGES", help="en-pt or pt-en, from the extra `pretrained`")
    parser.add_argument("--shortlist", action="store_true", help="use the lexical shortlist of a Marian model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")


def load_translator(options: argparse.Namespace) -> Translator:
    from .translate import Translator

    if options.checkpoint is not None:
        if options.shortlist:
            raise ValueError("--shortlist needs --model or --pretrained: a checkpoint has none")
        return Translator.load(options.checkpoint, options.device)
    if options.model is not None:
        return Translator.from_pretrained(options.model, options.device, options.shortlist)
    from ..pretrained.find import installed_model

    return Translator.from_pretrained(installed_model(options.pretrained), options.device, options.shortlist)


def run_info(options: argparse.Namespace) -> None:
    from .machine import machine_report

    print(machine_report())


def run_train(options: argparse.Namespace) -> None:
    from .machine import choose_device

    for name in ("sentencepiece", "safetensors", "tqdm", "sacrebleu"):
        optional_module(name)
    device = local_device(choose_device(options.device))
    with joined(device.type == "cuda") as processes:
        train_together(options, device, processes)


def train_together(options: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    """What each of the processes does; rank 0 alone prints."""
    from .corpora import load_corpus
    from .train import Trainer
    from .translate import Translator

    config, checkpoint = processes.all(lambda: settings_of_run(options, processes))
    processes.first(lambda: None if options.resume else claim_folder(options))
    quietly = contextlib.nullcontext() if processes.rank else None
    with quietly or heartbeat("getting the text"):
        corpus = processes.all(lambda: load_corpus(config.data, config.source_language, config.target_language, max_words=config.max_words))
    with quietly or heartbeat("preparing the text"):
        if checkpoint is not None:
            trainer = Trainer.resume(checkpoint, config, corpus, device, processes)
        else:
            trainer = Trainer(config, corpus, options.output, device, processes=processes)
    if processes.rank == 0:
        print(trainer.data_summary(), file=sys.stderr)
        trainer.report = event_writer(options.output) or trainer.report
    processes.first(lambda: atomic_write(options.output / SETTINGS_NAME, config.to_toml().encode()))
    trainer.run()
    name, text = corpus.held_out()
    translator = Translator(trainer.model, trainer.source_tokenizer, trainer.target_tokenizer)
    with quietly or heartbeat(f"translating {name}"):
        scores, _ = translator.score(text)
    if processes.rank == 0:
        print(f"{name}: {scores}")


def settings_of_run(options: argparse.Namespace, processes: Processes) -> tuple[TrainingConfig, Checkpoint | None]:
    """The settings that the command line asks for, and the checkpoint to resume."""
    from .checkpoint import read_checkpoint
    from .corpora import NAMED_CORPORA

    settings = {field.name: getattr(options, field.name, None) for field in fields(TrainingConfig)}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    budget: dict[str, Any] = {name: given.pop(name) for name in ("steps", "minutes") if name in given}
    checkpoint = None
    if options.resume:
        checkpoint = read_checkpoint(options.output)
        others = [name for name in ("config", "recipe") if getattr(options, name)]
        if unwanted := sorted(given.keys() - set(RESUMABLE_SETTINGS)) + others:
            raise ValueError(f"--resume keeps the run's settings; not allowed with it: {', '.join(unwanted)}")
        before = checkpoint.training_config()
        if not started_by_torchrun():
            before = replace(before, parallel="off")
        config = with_budget(replace(before, **given), budget)
        if not ("data" in given or config.data in NAMED_CORPORA or Path(config.data).is_dir()):
            raise ValueError(f"{checkpoint.path} was trained on the folder {config.data}, which is not there; --data says where it is now")
    else:
        config = RECIPES[options.recipe or "multi30k"]
        if options.config is not None:
            from_file = read_settings(options.config)
            budget = budget or {name: from_file.pop(name) for name in ("steps", "minutes") if name in from_file}
            given = {name: value for name, value in from_file.items() if name not in ("steps", "minutes")} | given
        config = with_budget(replace(config, **given), budget)
    if config.parallel == "off" and processes.count > 1:
        raise ValueError(f"there are {processes.count} processes: choose how they share the work, --parallel ddp or --parallel fsdp")
    if config.parallel != "off" and not started_by_torchrun():
        raise ValueError(
            f"--parallel {config.parallel} is for processes that torchrun starts: torchrun --nproc-per-node 2 -m fused_attention train ..."
        )
    return config, checkpoint


def claim_folder(options: argparse.Namespace) -> None:
    from .checkpoint import CHECKPOINT_NAME

    claim_output_folder(options.output, (CHECKPOINT_NAME, SETTINGS_NAME), overwrite=options.overwrite)


def event_writer(folder: Path) -> Callable[[str, float, int], None] | None:
    """Writes TensorBoard events, a scalar at a time, if tensorboard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "events").add_scalar


def run_average(options: argparse.Namespace) -> None:
    from .average import average
    from .checkpoint import CHECKPOINT_NAME

    optional_module("safetensors")
    claim_output_folder(options.output, (CHECKPOINT_NAME,), overwrite=options.overwrite)
    steps = average(options.folder, options.output, last=options.last, best=options.best)
    print(f"the mean of the weights after steps {', '.join(map(str, steps))}: {options.output}")


def run_quantize(options: argparse.Namespace) -> None:
    from ..quantize import torchao_quantization
    from .checkpoint import CHECKPOINT_NAME, read_checkpoint
    from .corpora import load_corpus
    from .quantize_checkpoint import comparison, quantize_checkpoint

    for name in ("sentencepiece", "safetensors", "sacrebleu"):
        optional_module(name)
    torchao_quantization()
    checkpoint = read_checkpoint(options.checkpoint)
    config = checkpoint.training_config()
    languages = config.source_language, config.target_language
    name, text = load_corpus(options.data or config.data, *languages, max_words=config.max_words).held_out()
    claim_output_folder(options.output, (CHECKPOINT_NAME,), overwrite=options.overwrite)
    quantize_checkpoint(checkpoint, options.output, dynamic=options.dynamic)
    for line in comparison(checkpoint.path, options.output, text, options.device):
        print(f"{name}: {line}", flush=True)


def with_budget(config: TrainingConfig, budget: dict[str, Any]) -> TrainingConfig:
    """The configuration with the given steps or minutes in place of its own."""
    return replace(config, **{"steps": None, "minutes": None, **budget}) if budget else config


def run_translate(options: argparse.Namespace) -> None:
    if options.n_best > 1 and (options.scores or options.alignment):
        raise ValueError("--n-best has scores already and no alignment: leave --scores and --alignment away")
    translator = load_translator(options)
    if options.cache is not None:
        set_cache(translator, options.cache)
    if options.stream or sys.stdin.isatty():
        stream_translations(translator, options)
        return
    with naming("stdin"):
        lines = text_lines("stdin", sys.stdin.buffer.read())
    with heartbeat("translating"):
        text, cut_sources, cut_translations = translated(translator, lines, options)
    report_cut(translator, cut_sources, cut_translations)
    with naming("stdout"):
        sys.stdout.buffer.write(text.encode())


def set_cache(translator: Translator, dtype: str) -> None:
    import torch

    from ..model import Transformer

    if not isinstance(translator.model, Transformer):
        raise ValueError("--cache is for a Transformer: an LSTM keeps no keys and values")
    translator.model.cache_dtype = getattr(torch, dtype)


def report_cut(translator: Translator, sources: Sequence[int], translations: Sequence[int]) -> None:
    """On stderr; indices of lines."""
    too_long = f"longer than {translator.model.max_len - 1} tokens and cut"
    for what, indices in ((too_long, sources), ("translation cut before its end", translations)):
        if indices:
            print(f"fused-attention: {what}: {line_numbers(indices)}", file=sys.stderr)


def translated(translator: Translator, lines: list[str], options: argparse.Namespace, first: int = 0) -> tuple[str, list[int], list[int]]:
    """What is printed of lines; the indices of sources and of translations that were cut. All count from `first`."""
    done = translator.translations(lines, beam=options.beam, n_best=options.n_best, scores=options.scores)
    if options.n_best > 1:
        numbered = [(number, found) for number, candidates in enumerate(done.candidates, first) for found in candidates]
        printed = [f"{number} ||| {found.text} ||| {found.score:.4f}" for number, found in numbered]
    else:
        printed = list(done.lines)
        if options.scores:
            printed = [f"{line}\t{found[0].score:.4f}" if found else line for line, found in zip(printed, done.candidates, strict=True)]
        if options.alignment:
            pairs = [translator.alignment(line, translation) for line, translation in zip(lines, done.lines, strict=True)]
            printed = [f"{line} ||| {' '.join(f'{s}-{t}' for s, t in of_line)}" for line, of_line in zip(printed, pairs, strict=True)]
    cut_sources, cut_translations = ([first + i for i in indices] for indices in (done.cut_sources, done.cut_translations))
    return "".join(f"{line}\n" for line in printed), cut_sources, cut_translations


def stream_translations(translator: Translator, options: argparse.Namespace) -> None:
    """Each line is translated when it is there; where nothing but its text is asked for, piece by piece."""
    in_pieces = options.beam == options.n_best == 1 and not options.scores and not options.alignment
    with naming("stdin"):
        for number, raw in enumerate(iter(sys.stdin.buffer.readline, b"")):
            line = decoded(f"line {number + 1} of stdin", raw).rstrip("\n")
            if in_pieces:
                done = translator.stream(line)
                write_at_once(itertools.chain(done, "\n"))
                report_cut(translator, [number] * done.cut_source, [number] * done.cut_translation)
            else:
                text, cut_sources, cut_translations = translated(translator, [line], options, number)
                write_at_once([text])
                report_cut(translator, cut_sources, cut_translations)


def write_at_once(pieces: Iterable[str]) -> None:
    """On stdout, each piece when it is there."""
    for piece in pieces:
        with naming("stdout"):
            sys.stdout.buffer.write(piece.encode())
            sys.stdout.buffer.flush()


def run_score(options: argparse.Namespace) -> None:
    sides = [text_lines(str(path), path.read_bytes()) for path in (options.source, options.translation)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{options.source} has {len(sides[0]):,} lines and {options.translation} {len(sides[1]):,}")
    translator = load_translator(options)
    with heartbeat("scoring"):
        found = translator.log_probabilities(*sides)
    with naming("stdout"):
        sys.stdout.write("".join(f"{value:.4f}\n" for value in found))


def run_export(options: argparse.Namespace) -> None:
    import torch

    from ..export import export_programs
    from ..model import Transformer

    if options.shortlist:
        raise ValueError("--shortlist does not go with export: a program holds the whole vocabulary")
    translator = load_translator(options)
    assert isinstance(translator.model, Transformer)
    claim_output_folder(options.output, EXPORTED_FILES, overwrite=options.overwrite)
    with heartbeat("exporting"):
        for name, program in zip((ENCODER, STEP), export_programs(translator.model), strict=True):
            data = io.BytesIO()
            torch.export.save(program, data, extra_files={"config.json": json.dumps(translator.model.config)})
            atomic_write(options.output / name, data.getvalue())
    atomic_write(options.output / SOURCE_VOCABULARY, translator.source_tokenizer.model)
    atomic_write(options.output / TARGET_VOCABULARY, translator.target_tokenizer.model)


def decoded(name: str, data: bytes) -> str:
    """ValueError, which names the source of the data, if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def text_lines(name: str, data: bytes) -> list[str]:
    lines = decoded(name, data).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def line_numbers(indices: Sequence[int], most: int = 10) -> str:
    """Indices of lines as a reader counts them: "line 3", "lines 3, 7", or how many there are and the first ones."""
    numbers = ", ".join(str(index + 1) for index in indices[:most])
    if len(indices) > most:
        return f"{len(indices):,} lines ({numbers}, ...)"
    return f"line{'s' if len(indices) > 1 else ''} {numbers}"


def run_demo(options: argparse.Namespace) -> None:
    if options.task == "digits":
        from ..digits import demo as digits_demo

        for name in ("minutes", "data"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is for --task translation: digits come with scikit-learn and are trained on for a minute")
        digits_demo.run_demo(options.output, overwrite=options.overwrite, device=options.device)
        return

    from . import demo

    demo.run_demo(options.output, minutes=options.minutes, data=options.data, overwrite=options.overwrite, device=options.device)


def run_compare(options: argparse.Namespace) -> None:
    comparison = benchmark_module("recurrence.compare")
    grid, config = comparison.GRIDS[options.grid], replace(comparison.CONFIG, data=options.data)
    if options.minutes is not None:
        grid = replace(grid, minutes=options.minutes)
    comparison.run_compare(options.output, grid, config, options.device)


def benchmark_module(name: str) -> Any:
    """A module of the benchmarks. Raises ImportError if this installation lacks them."""
    try:
        return importlib.import_module(f"fused_attention.benchmarks.{name}".rstrip("."))
    except ImportError as error:
        raise ImportError(f"this installation has no benchmarks ({error}); run them from a checkout of the repository") from error


def run_bench(options: argparse.Namespace) -> int:
    for module in ("pytest", "pytest_benchmark"):
        optional_module(module, "bench")
    benchmark_module("")
    return int(benchmark_module("command").main(options.bench_arguments))
