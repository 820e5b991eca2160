"""The command line: each verb calls one function of `speechtune.commands`, whose module loads only then.

argparse, because libraries that make flags of function signatures import for three times as long as all of `--help`
takes here, and would need those functions, whose modules import torch.
"""

import argparse
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from speechtune import __version__
from speechtune.commands.guarded import guarded


def number(
    kind: type[int] | type[float], least: float, most: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """A type of argument: a number from `least` (with `above`: over it) to `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or value > most or math.isinf(value):
            what = "a whole number" if kind is int else "a number"
            upper = f" and at most {most:g}" if most < math.inf else ""
            bound = "above" if above else "at least"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound} {least:g}{upper}")
        return value

    return parse


COUNT = number(int, 1)
POSITIVE = number(float, 0, above=True)
NOT_NEGATIVE = number(float, 0)


def numbers(text: str) -> tuple[float, ...]:
    """A type of argument: different numbers from 0, with commas between."""
    return tuple(dict.fromkeys(map(NOT_NEGATIVE, text.split(","))))


class ModelOption(argparse.Action):
    """A flag that stands for an option of the recipe's `model:`, with what goes with it; all make one mapping."""

    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        """Add the option to those given before it."""
        (name, more), given = cast(tuple[str, dict[str, str]], self.const), getattr(namespace, self.dest)
        setattr(namespace, self.dest, {**given, name: values, **more})


class Verbs:
    """A parser's verbs; "encode" calls `speechtune.commands.encode.run_encode` where no other module is named."""

    def __init__(self, parser: argparse.ArgumentParser, metavar: str) -> None:
        self.parsers = parser.add_subparsers(required=True, metavar=metavar)

    def add(self, name: str, help: str, module: str | None = None, *, json: bool = True) -> Callable[..., object]:
        """A new verb; the function returned adds an argument to it."""
        parser = self.parsers.add_parser(name, help=help)
        if json:
            parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")
        parser.set_defaults(module=f"speechtune.commands.{module or name}", function=f"run_{name}")
        return parser.add_argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors meant for users become one message and an exit code."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    given = vars(parsed)
    if rest and ("overrides" not in given or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse finds them in one place alone; they may also stand behind flags
        given["overrides"] = [*given["overrides"], *rest]
    module, function = given.pop("module"), given.pop("function")
    return guarded(lambda: getattr(importlib.import_module(module), function)(**given))


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their flags."""
    parser = argparse.ArgumentParser(
        prog="speechtune", description="Fine-tune speech language models with LoRA, and prove that it happened."
    )
    parser.add_argument("--version", action="version", version=f"speechtune {__version__}")
    verbs = Verbs(parser, "VERB")
    demo = verbs.add("demo", "the complete pipeline on a small model, in minutes on a CPU", json=False)
    demo("what", nargs="?", default="voice", help="voice (the default), pronunciation, or a family's name")
    demo("--asr", help="recogniser of the voice's words, as for evaluate (default: pocketsphinx, where installed)")
    demo("--dir", dest="directory", type=Path, default=Path("speechtune-demo"), help="folder (default: %(default)s)")
    _recipe_verbs(verbs)
    _model_verbs(verbs)
    _adapter_verbs(verbs)
    report = verbs.add("report", "write report.html and report.md on one run, or compare several")
    report("runs", type=Path, nargs="+", metavar="RUN", help="run directories, finished or not")
    report("--out", type=Path, help="HTML file or folder (default: the run's, or the current one)")
    studio = verbs.add("studio", "prepare, train, listen and compare on a page in a browser", json=False)
    studio("--dir", dest="directory", type=Path, default=Path("speechtune-studio"), help="(default: %(default)s)")
    studio("--allow", type=Path, action="append", default=[], metavar="FOLDER", help="data it may read; repeatable")
    studio("--port", type=number(int, 1, 65535), default=7860, help="on 127.0.0.1 (default: %(default)s)")
    lint = verbs.add("lint", "find training scripts' issues around LoRA and loss, and fix the clear ones")
    lint("paths", type=Path, nargs="+", help="scripts or folders")
    lint("--fix", action="store_true", help="fix what is certain, keeping a backup")
    return parser


def _recipe_verbs(verbs: Verbs) -> None:
    recipes = verbs.add("recipes", "list the recipes that come with speechtune, print one, or copy one")
    recipes("name", nargs="?", help="recipe to print")
    recipes("--out", type=Path, help="new file to copy it to")
    validate = verbs.add("validate", "list every issue of a data file with line and reason")
    data = "ChatML JSON/JSONL, folder with metadata.json, wav/txt or Speechocean762 folder"
    validate("manifest", type=Path, help=data)
    validate("--metadata-only", action="store_true", help="do not decode the audio")
    validate("--audio-root", type=Path, help="confine every audio path to this folder")
    validate("--allow-urls", action="store_true", help="accept audio given as http(s) URL")
    validate("--min-seconds", type=NOT_NEGATIVE, default=0.1, help="shortest clip accepted (default: %(default)s)")
    validate(
        "--max-seconds",
        type=POSITIVE,
        default=60.0,
        help="longest clip accepted (default: %(default)s)",
    )
    _prepare_verb(verbs)
    encode = verbs.add("encode", "encode all clips of a recipe's data into the cache, resumably")
    encode("--verify", action="store_true", help="read all cached clips and encode damaged ones anew")
    encode("--shard", metavar="I/N", help="encode only this share of the clips, I from 0 to N-1")
    encode("--engine", choices=("local", "ray"), default="local", help="(default: %(default)s)")
    encode("--shards", type=COUNT, metavar="N", help="tasks of --engine ray (default: one per GPU or machine)")
    fit = verbs.add("fit", "measure what a recipe needs on this machine: batch.tokens, memory, time, cost")
    fit("--price-per-hour", type=NOT_NEGATIVE, help="of this machine, in any currency: adds the cost")
    train = verbs.add("train", "train as a recipe says")
    train("--dry-run", action="store_true", help="print the resolved recipe and counts; load no weights")
    doctor = verbs.add("doctor", "check machine, files, data and one real training step; says the cure")
    for verb in (encode, fit, train, doctor):
        optional = {"nargs": "?"} if verb is doctor else {}
        verb("recipe", type=Path, help="YAML recipe, or the name of one that `speechtune recipes` lists", **optional)
        verb("overrides", nargs="*", default=[], metavar="section.key=value", help="replace options of the recipe")


def _prepare_verb(verbs: Verbs) -> None:
    prepare = verbs.add("prepare", "cut, transcribe and check raw recordings: clips ready for training, and a verdict")
    prepare("recordings", type=Path, help="audio file, or folder of them")
    prepare(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="replace options, see docs/prepare.md"
    )
    prepare("--out", type=Path, required=True, help="folder of the data")
    prepare("--script", type=Path, help="text file of what was to be said, a line a sentence or paragraph")
    prepare("--asr", help="recogniser, such as faster-whisper:base.en or faster-whisper:FOLDER")
    prepare("--language", help="code such as en (default: detected)")
    prepare("--speaker", metavar="NAME", help="name of the voice in the data (default: voice-1)")
    prepare("--config", type=Path, help="YAML of options, such as the prepare.yaml of an earlier run")


def _model_verbs(verbs: Verbs) -> None:
    generate = verbs.add("generate", "speak a text in a reference's voice, or all texts of a manifest")
    generate("manifest", type=Path, nargs="?", help="manifest whose texts are spoken; else --text")
    generate("--text", help="what to say")
    generate("--reference", type=Path, help="recording of the voice")
    generate("--reference-text", help="what is said in the recording")
    generate("--system", help="system message, where the training data carried one of their own")
    generate("--scene", help="description of the scene")
    generate("--adapter", type=Path, help="PEFT folder")
    generate("--strength", type=NOT_NEGATIVE, help="how much of the adapter counts: 0 none, 1 all (the default)")
    generate("--out", type=Path, required=True, help="wav file, or folder for a manifest")
    generate("--top-k", type=COUNT)
    generate("--top-p", type=number(float, 0, 1, above=True))
    generate("--ras-win-len", type=COUNT, help="window of repetition-aware sampling, in rows")
    generate("--ras-win-max-num-repeat", type=COUNT, help="repeats in the window before a code is redrawn")
    score = verbs.add("score", "pronunciation of recordings: scores, words and phones as said")
    score("audio", type=Path, nargs="*", help="audio files")
    score("--text", help="what was to be read: phones are aligned with it")
    score("--manifest", type=Path, help="many recordings: JSONL, or pronunciation data")
    score("--out", type=Path, help="JSONL file to write")
    score("--adapter", type=Path, help="adapter, run or checkpoint folder")
    evaluate = verbs.add("evaluate", "measure models on recordings or prompts, beside base and baselines")
    evaluate("data", type=Path, help="pronunciation data, a voice-cloning manifest, or a seed-tts .lst")
    evaluate("--out", type=Path, required=True, help="folder for metrics.json, utterances.jsonl, answers")
    evaluate("--adapter", type=Path, action="append", default=[], help="may be given several times")
    strengths = "of the adapters, each measured, such as 0,0.5,1; 0 is the base (default: 1)"
    evaluate("--strength", type=numbers, default=(), metavar="S,S,...", help=strengths)
    evaluate("--train", type=Path, help="pronunciation: data of the mean-score baseline")
    evaluate("--tasks", nargs="+", choices=("APA", "MDD"), default=(), help="(default: both)")
    evaluate("--no-base", action="store_true", help="voices: do not let the base speak too")
    evaluate("--asr", help="voices: recogniser for WER, such as faster-whisper:base.en or pocketsphinx")
    evaluate("--speaker", help="voices: encoder for similarity, such as wavlm:ID or resemblyzer")
    evaluate("--mos", help="voices: predictor of naturalness, distillmos or dnsmos")
    serve = verbs.add("serve", "speak or assess over HTTP, as OpenAI's API does", json=False)
    serve("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="may be given several times")
    serve("--adapter-root", type=Path, help="folder of adapters that may be added by name while it serves")
    serve("--dir", dest="directory", type=Path, default=Path("speechtune-server"), help="(default: %(default)s)")
    serve("--host", default="127.0.0.1", help="another than this machine's own asks for SPEECHTUNE_API_KEY")
    serve("--port", type=number(int, 0, 65535), default=8000, help="0 takes a free one (default: %(default)s)")
    serve("--max-characters", type=COUNT, default=20_000, help="longest text (default: %(default)s)")
    serve("--max-requests", type=COUNT, default=256, help="at one time (default: %(default)s)")
    serve("--deadline", type=POSITIVE, default=300.0, help="seconds for an answer (default: %(default)s)")
    _model_option(serve, "codec_path", "--codec", help="of voices: hub id or folder (default: the released one)")
    _conditioning(serve)
    for verb in (generate, evaluate):
        _model_option(verb, "codec_path", "--codec", help="of voices: hub id or folder (default: the released one)")
        _conditioning(verb)
        verb("--seed", type=number(int, 0, 2**63 - 1), default=42, help="of voices (default: %(default)s)")
        verb("--temperature", type=NOT_NEGATIVE, help="of voices: 0 is greedy")
    for verb in (score, evaluate, serve):
        _speech_lora(verb)
    for verb in (generate, score, evaluate, serve):
        verb("--model", help="base or merged model: hub id or folder (default: the adapter's base)")
        speaks = verb in (generate, serve)
        rows = "most rows of codes, 25 a second (default: 2048)" if speaks else "length cap of an answer"
        verb("--max-new-tokens", type=COUNT, help=rows)
        verb("--batch-size", type=COUNT, default=32 if verb is serve else 8, help="(default: %(default)s)")
    for verb in (generate, score, evaluate):
        verb("--cache-dir", type=Path, default=Path("speechtune-cache"), help="(default: %(default)s)")


def _model_option(
    verb: Callable[..., object], name: str, flag: str, more: Mapping[str, str] = MappingProxyType({}), **options: object
) -> None:
    verb(flag, dest="model_options", action=ModelOption, const=(name, more), default={}, **options)


def _conditioning(verb: Callable[..., object]) -> None:
    what = "hub id or folder of the Whisper of a model trained with one, where neither adapter nor recipe says it"
    _model_option(verb, "whisper_path", "--whisper-path", {"reference_conditioning": "whisper"}, help=what)
    what = "to how many embeddings a reference was pooled in that training (default: one a codec frame)"
    _model_option(verb, "reference_positions", "--reference-positions", type=COUNT, help=what)


def _speech_lora(verb: Callable[..., object]) -> None:
    modes = ("merge", "continue", "stack", "drop")
    what = "of an adapter without base_recipe.json: what its base's speech LoRA had become when it was trained"
    _model_option(verb, "speech_lora", "--speech-lora", choices=modes, help=what)


def _adapter_verbs(verbs: Verbs) -> None:
    merge = verbs.add("merge", "merge an adapter into its base, checked before it is written", "adapters")
    merge("adapter", type=Path, help="adapter or checkpoint folder, in any layout")
    merge("output", type=Path, help="new folder of the merged model")
    merge("--model", dest="base", help="base: hub id or folder (default: the one the adapter names)")
    _model_option(merge, "codec_path", "--codec", help="hub id or folder of the codec, recorded in merge_info.json")
    _conditioning(merge)
    _speech_lora(merge)
    merge("--strength", type=NOT_NEGATIVE, default=1.0, help="how much of the adapter counts (default: %(default)s)")
    merge("--dtype", choices=("float32", "bfloat16", "float16"), help="weights (default: the base's)")
    merge("--compare-models", action="store_true", help="print how base, adapter and merged differ")
    merge("--max-shard-size", default="5GB", help="largest weights file (default: %(default)s)")
    push = verbs.add("push", "upload an adapter with its card and samples to the Hugging Face hub", "adapters")
    push("path", type=Path, help="adapter, run or checkpoint folder")
    push("repository", help="owner/name")
    push("--private", action="store_true", help="make a new repository private")
    push("--no-samples", action="store_true", help="leave the recordings of the last evaluation out")
    push("--dry-run", action="store_true", help="check, and show what would be sent")
    about = "verify, find, extract and convert LoRA adapters"
    adapters = Verbs(verbs.parsers.add_parser("adapters", help=about), "ACTION")
    verify = adapters.add("verify", "prove that an adapter is complete, trained and fits its base", "adapters")
    verify("path", type=Path, help="adapter folder")
    verify("--base", help="load it onto this base too (hub id or folder) and prove an effect")
    _conditioning(verify)
    _speech_lora(verify)
    verify("--find-all", action="store_true", help="every adapter below the path")
    verify("--verbose", action="store_true", help="every check, not only the issues")
    find = adapters.add("find", "list every adapter below a folder, by content", "adapters")
    find("root", type=Path, help="folder to search")
    find("--verbose", action="store_true", help="issues and details of each")
    extract = adapters.add("extract", "rescue LoRA weights out of a full checkpoint", "adapters")
    extract("checkpoint", type=Path, help="checkpoint folder or weights file")
    extract("output", type=Path, help="new adapter folder")
    extract(
        "--alpha",
        type=POSITIVE,
        help="lora_alpha of the training (default: files near the checkpoint)",
    )
    extract("--base", help="hub id or folder of the base (default: files near the checkpoint)")
    extract("--rslora", action="store_true", default=None, help="the training scaled by sqrt(rank)")
    extract("--adapter-name", help="which adapter, where the checkpoint holds several")
    convert = adapters.add("convert", "rename an adapter's tensors: native or the original's (boson)", "adapters")
    convert("adapter", type=Path, help="adapter folder, safetensors or .bin")
    convert("output", type=Path, help="new adapter folder")
    convert("--to", required=True, metavar="LAYOUT", help="native, or one its family knows, such as boson")
    convert("--base", help="hub id or folder of the base (default: the one the adapter names)")
