"""The tab Listen: one text by base, adapter and checkpoints, side by side or blind."""

from collections.abc import Iterator
from typing import Any, get_args

import gradio as gr

from speechtune.errors import ConfigError
from speechtune.studio import form, listening
from speechtune.studio.form import SHIPPED
from speechtune.studio.listening import BASE, Request, Vote
from speechtune.studio.reporting import MODEL, choices, player, recorder, reported
from speechtune.studio.workspace import Workspace

MAX_STRENGTH = 1.5


def build(workspace: Workspace, tab: gr.Tab) -> None:
    """Lay out the tab and connect it."""
    run = gr.Dropdown(label="Run", choices=[SHIPPED], value=SHIPPED, elem_id="listen-run")
    voices = gr.CheckboxGroup(label="Who speaks", choices=[BASE], value=[BASE], elem_id="listen-voices")
    text = gr.Textbox(label="Text", value="Please hold while we try to connect you.", elem_id="listen-text")
    with gr.Row():
        reference = recorder("Recording of the voice", "upload")
        reference_text = gr.Textbox(label="What is said in the recording")
    with gr.Row():
        strength = gr.Slider(
            0, MAX_STRENGTH, 1, step=0.05, label="Strength of adapters", info="0 is the base, 1 the adapter as trained."
        )
        seed = gr.Number(42, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        temperature = gr.Textbox(label="Temperature", info="0 is greedy; empty: as the model says.")
        longest = gr.Number(500, label="Most rows of codes", info="25 a second.", precision=0, minimum=1)
    asked = [run, text, reference, reference_text, strength, seed, temperature, longest]
    say = gr.Button("Speak", variant="primary", elem_id="listen-speak")
    made = gr.State([])
    with gr.Accordion("Blind comparison", open=False):
        compared = _blind_comparison(workspace, asked)

    @gr.render(inputs=made, triggers=[made.change])
    def players(made: list[tuple[str, str]]) -> None:
        for voice, path in made:
            player(voice, path, elem_classes="spoken")

    @reported
    def speak(voices: list[str], *answers: Any) -> Iterator[list[tuple[str, str]]]:
        done: list[tuple[str, str]] = []
        for voice, path in listening.speak(_request(*answers), voices, workspace):
            done = [*done, (voice, str(path))]
            yield done

    @reported
    def offer(run: str | None) -> tuple[Any, ...]:
        names = listening.voices_of(run, workspace)
        one, other = choices(names), choices(names, names[min(1, len(names) - 1)])
        return gr.update(choices=names, value=names[:2]), one, other

    say.click(speak, [voices, *asked], made, concurrency_id=MODEL)
    run.change(offer, run, [voices, *compared])
    runs = [run]
    tab.select(lambda run: choices([*workspace.names("runs", "config.yaml"), SHIPPED], run), runs, runs)


def _request(*answers: Any) -> Request:
    """The answers of the page's fields, in their order."""
    run, text, reference, spoken, strength, seed, temperature, longest = answers
    warmth = form.number("temperature", temperature)
    return Request(run, text, reference, spoken, float(strength), int(seed or 0), warmth, int(longest or 500))


def _blind_comparison(workspace: Workspace, asked: list[Any]) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Lay out the comparison of two voices of a run, and connect it; the fields in which they are chosen."""
    with gr.Row():
        first = gr.Dropdown(label="Compare", choices=[BASE], value=BASE)
        second = gr.Dropdown(label="with", choices=[BASE], value=BASE)
    new_pair = gr.Button("Play a new pair", elem_id="blind-new")
    pair = gr.State(None)
    with gr.Row():
        clip_a = player("A")
        clip_b = player("B")
    with gr.Row():
        votes = {answer: gr.Button(answer) for answer in get_args(Vote)}
    result = gr.Markdown(elem_id="blind-result")

    @reported
    def play_pair(first: str, second: str, *answers: Any) -> tuple[Any, ...]:
        made = listening.blind_pair(_request(*answers), first, second, workspace)
        return made, *map(str, made.clips), "Which one is better?"

    def vote_for(answer: Vote) -> Any:
        @reported
        def count(pair: listening.Pair | None, first: str, second: str) -> tuple[Any, ...]:
            if pair is None:
                raise ConfigError("play a pair first")
            listening.vote(pair, answer, workspace)
            first, second = (first, second) if {first, second} == set(pair.voices) else pair.voices
            said = f"A was **{pair.voices[0]}**, B was **{pair.voices[1]}**. "
            return None, said + describe(listening.tally(pair.run, first, second, workspace), first, second)

        return count

    new_pair.click(play_pair, [first, second, *asked], [pair, clip_a, clip_b, result], concurrency_id=MODEL)
    for answer, button in votes.items():
        button.click(vote_for(answer), [pair, first, second], [pair, result])
    return first, second


def describe(tally: listening.Preference, first: str, second: str) -> str:
    """The tally of a blind comparison in a sentence."""
    counts = f"{first}: {tally.first}, {second}: {tally.second}, no difference: {tally.neither}"
    if tally.first + tally.second == 0:
        return f"{counts}. Nothing can be said yet."
    interval = f"{tally.share:.0%} (95 % interval {tally.low:.0%} to {tally.high:.0%}, p = {tally.p_value:.2g})"
    return f"{counts}. {first} was preferred in {interval} of the votes for either."
