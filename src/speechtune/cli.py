"""The verbs of the command line, each a thin call into one function; heavy modules load only when a verb runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechtune import __version__
from speechtune.commands.guarded import guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors meant for users become one message and an exit code."""
    options = build_parser().parse_args(arguments)
    return guarded(lambda: options.run(options))


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their flags."""
    parser = argparse.ArgumentParser(
        prog="speechtune", description="Fine-tune speech language models with LoRA, and prove that it happened."
    )
    parser.add_argument("--version", action="version", version=f"speechtune {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="the whole pipeline on a small model and real speech, in minutes on a CPU")
    demo.add_argument("what", nargs="?", default="voice", help="voice (the default), pronunciation, or a family's name")
    demo.add_argument(
        "--dir", dest="directory", type=Path, default=Path("speechtune-demo"), help="folder (default: %(default)s)"
    )
    _call(demo, "demo", "run_demo", as_json=False)

    _validate_verb(verbs)
    _encode_verb(verbs)
    fit = _recipe_verb(verbs, "fit", "measure what a recipe needs on this machine: batch.tokens, memory, time, cost")
    fit.add_argument("--price-per-hour", type=float, help="of this machine, in any currency: adds the cost")
    _call(fit, "fit", "run_fit")
    train = _recipe_verb(verbs, "train", "train as a recipe says")
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and counts; load no weights")
    _call(train, "train", "run_train")

    _generate_verb(verbs)

    doctor = verbs.add_parser("doctor", help="check machine, files, data and one real training step; says the cure")
    doctor.add_argument("recipe", type=Path, nargs="?", help="YAML recipe; without one the environment only")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that replace the recipe's")
    _call(doctor, "doctor", "run_doctor")

    merge = verbs.add_parser("merge", help="merge an adapter into its base, checked before it is written")
    merge.add_argument("adapter", type=Path, help="adapter or checkpoint folder, in any layout")
    merge.add_argument("output", type=Path, help="new folder of the merged model")
    merge.add_argument("--model", dest="base", help="base: hub id or folder (default: the one the adapter names)")
    merge.add_argument("--codec", help="hub id or folder of the codec, recorded in merge_info.json")
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="weights (default: the base's)")
    merge.add_argument("--compare-models", action="store_true", help="print how base, adapter and merged differ")
    merge.add_argument("--max-shard-size", default="5GB", help="largest weights file (default: %(default)s)")
    _call(merge, "adapters", "run_merge")

    adapters = verbs.add_parser("adapters", help="verify, find, extract and convert LoRA adapters")
    _assessment_verbs(verbs)
    _sharing_verbs(verbs)
    _adapter_verbs(adapters.add_subparsers(dest="action", required=True, metavar="ACTION"))

    lint = verbs.add_parser("lint", help="find training scripts' issues around LoRA and loss, and mend the clear ones")
    lint.add_argument("paths", type=Path, nargs="+", help="scripts or folders")
    lint.add_argument("--fix", action="store_true", help="mend what can be mended, keeping a backup")
    _call(lint, "lint", "run_lint")
    return parser


def _validate_verb(verbs: Any) -> None:
    validate = verbs.add_parser("validate", help="list every issue of a data file with line and reason")
    validate.add_argument(
        "manifest", type=Path, help="ChatML JSON/JSONL, folder with metadata.json, wav/txt or Speechocean762 folder"
    )
    validate.add_argument("--metadata-only", action="store_true", help="do not decode the audio")
    validate.add_argument("--audio-root", type=Path, help="confine every audio path to this folder")
    validate.add_argument("--allow-urls", action="store_true", help="accept audio given as http(s) URL")
    validate.add_argument("--min-seconds", type=float, default=0.1, help="shortest clip (default: %(default)s)")
    validate.add_argument(
        "--max-seconds", type=float, default=60.0, help="longest clip accepted (default: %(default)s)"
    )
    _call(validate, "validate", "run_validate")


def _recipe_verb(verbs: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=help_text)
    verb.add_argument("recipe", type=Path, help="YAML recipe")
    verb.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="options that replace the recipe's"
    )
    return verb


def _encode_verb(verbs: Any) -> None:
    encode = _recipe_verb(verbs, "encode", "encode all clips of a recipe's data into the cache, resumably")
    encode.add_argument("--verify", action="store_true", help="read all cached clips and encode damaged ones anew")
    encode.add_argument("--shard", metavar="I/N", help="encode only this share of the clips, I from 0 to N-1")
    encode.add_argument("--engine", choices=("local", "ray"), default="local", help="(default: %(default)s)")
    encode.add_argument(
        "--shards", type=int, metavar="N", help="tasks of --engine ray (default: one per GPU or machine)"
    )
    _call(encode, "encode", "run_encode")


def _generate_verb(verbs: Any) -> None:
    generate = verbs.add_parser("generate", help="speak a text in the voice of a reference, or a whole manifest")
    generate.add_argument("manifest", type=Path, nargs="?", help="manifest whose texts are spoken; else --text")
    generate.add_argument("--text", help="what to say")
    generate.add_argument("--reference", type=Path, help="recording of the voice")
    generate.add_argument("--reference-text", help="what is said in the recording")
    generate.add_argument("--system", help="system message, where the training data carried one of their own")
    generate.add_argument("--scene", help="description of the scene")
    generate.add_argument("--model", help="base or merged model: hub id or folder (default: the adapter's base)")
    generate.add_argument("--codec", help="hub id or folder of the codec (default: the released one)")
    generate.add_argument("--adapter", type=Path, help="PEFT folder")
    generate.add_argument("--out", type=Path, required=True, help="wav file, or folder for a manifest")
    generate.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    generate.add_argument("--temperature", type=float, help="0 is greedy")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--ras-win-len", type=int, help="window of repetition-aware sampling, in rows")
    generate.add_argument("--ras-win-max-num-repeat", type=int, help="repeats in the window before a code is redrawn")
    generate.add_argument("--max-new-tokens", type=int, help="length cap in rows, 25 a second (default: 2048)")
    generate.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    generate.add_argument("--cache-dir", type=Path, default=Path("speechtune-cache"), help="(default: %(default)s)")
    _call(generate, "generate", "run_generate")


def _sharing_verbs(verbs: Any) -> None:
    report = verbs.add_parser("report", help="write report.html and report.md on one run, or compare several")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, finished or not")
    report.add_argument("--out", type=Path, help="HTML file or folder (default: the run's, or the current one)")
    _call(report, "report", "run_report")
    push = verbs.add_parser("push", help="upload an adapter with its card and samples to the Hugging Face hub")
    push.add_argument("path", type=Path, help="adapter, run or checkpoint folder")
    push.add_argument("repository", help="owner/name")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--no-samples", action="store_true", help="leave the recordings of the last evaluation out")
    push.add_argument("--dry-run", action="store_true", help="check, and show what would be sent")
    _call(push, "adapters", "run_push")


def _assessment_verbs(verbs: Any) -> None:
    score = verbs.add_parser("score", help="pronunciation of recordings: scores, words and phones as said")
    score.add_argument("audio", type=Path, nargs="*", help="audio files")
    score.add_argument("--text", help="what was to be read: phones are aligned with it")
    score.add_argument("--manifest", type=Path, help="many recordings: JSONL, or pronunciation data")
    score.add_argument("--out", type=Path, help="JSONL file to write")
    score.add_argument("--adapter", type=Path, help="adapter, run or checkpoint folder")
    evaluate = verbs.add_parser("evaluate", help="measure models on recordings or prompts, beside base and baselines")
    evaluate.add_argument("data", type=Path, help="pronunciation data, a voice-cloning manifest, or a seed-tts .lst")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for metrics.json, utterances.jsonl, answers")
    evaluate.add_argument("--adapter", type=Path, action="append", default=[], help="may be given several times")
    evaluate.add_argument("--train", type=Path, help="pronunciation: data of the mean-score baseline")
    evaluate.add_argument("--tasks", nargs="+", choices=("APA", "MDD"), default=(), help="(default: both)")
    evaluate.add_argument("--no-base", action="store_true", help="voices: do not let the base speak too")
    evaluate.add_argument("--codec", help="voices: hub id or folder of the codec (default: the released one)")
    evaluate.add_argument("--asr", help="voices: recogniser for WER, such as faster-whisper:base.en or pocketsphinx")
    evaluate.add_argument("--speaker", help="voices: encoder for similarity, such as wavlm:ID or resemblyzer")
    evaluate.add_argument("--mos", help="voices: predictor of naturalness, distillmos or dnsmos")
    evaluate.add_argument("--seed", type=int, default=42, help="voices (default: %(default)s)")
    evaluate.add_argument("--temperature", type=float, help="voices: 0 is greedy")
    for verb, function in ((score, "run_score"), (evaluate, "run_evaluate")):
        verb.add_argument("--model", help="base or merged model: hub id or folder (default: the adapter's base)")
        verb.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
        verb.add_argument("--max-new-tokens", type=int, help="length cap of an answer")
        verb.add_argument("--cache-dir", type=Path, default=Path("speechtune-cache"), help="(default: %(default)s)")
        _call(verb, verb.prog.split()[-1], function)


def _adapter_verbs(actions: Any) -> None:
    verify = actions.add_parser("verify", help="prove that an adapter is whole, trained and fits its base; exit 0 or 1")
    verify.add_argument("path", type=Path, help="adapter folder")
    verify.add_argument("--base", help="load it onto this base too (hub id or folder) and prove an effect")
    verify.add_argument("--find-all", action="store_true", help="every adapter below the path")
    verify.add_argument("--verbose", action="store_true", help="every check, not only the issues")
    _call(verify, "adapters", "run_verify")

    find = actions.add_parser("find", help="list every adapter below a folder, by content")
    find.add_argument("root", type=Path, help="folder to search")
    find.add_argument("--verbose", action="store_true", help="issues and details of each")
    _call(find, "adapters", "run_find")

    extract = actions.add_parser("extract", help="rescue LoRA weights out of a full checkpoint")
    extract.add_argument("checkpoint", type=Path, help="checkpoint folder or weights file")
    extract.add_argument("output", type=Path, help="new adapter folder")
    extract.add_argument("--alpha", type=float, help="lora_alpha of the training (default: files near the checkpoint)")
    extract.add_argument("--base", help="hub id or folder of the base (default: files near the checkpoint)")
    extract.add_argument("--rslora", action="store_true", default=None, help="the training scaled by sqrt(rank)")
    extract.add_argument("--adapter-name", help="which adapter, where the checkpoint holds several")
    _call(extract, "adapters", "run_extract")

    convert = actions.add_parser("convert", help="change an adapter's layout: native or the original package's (boson)")
    convert.add_argument("adapter", type=Path, help="adapter folder, safetensors or .bin")
    convert.add_argument("output", type=Path, help="new adapter folder")
    convert.add_argument("--to", choices=("native", "boson"), required=True, help="layout wanted")
    convert.add_argument("--base", help="hub id or folder of the base (default: the one the adapter names)")
    _call(convert, "adapters", "run_convert")


def _call(parser: argparse.ArgumentParser, module: str, function: str, *, as_json: bool = True) -> None:
    """Let a verb pass its arguments, by name, to one function of `speechtune.commands` that prints its own result."""
    if as_json:
        parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")

    def run(options: argparse.Namespace) -> int:
        given = {name: value for name, value in vars(options).items() if name not in {"run", "verb", "action"}}
        return getattr(importlib.import_module(f"speechtune.commands.{module}"), function)(**given)

    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
