"""The tab Pronounce: a sentence to read, its scores, its phones in colour, and the scores so far."""

from pathlib import Path
from typing import Any

import gradio as gr

from speechtune.preparation.coverage import own_sentences
from speechtune.studio import assessment
from speechtune.studio.assessment import EMBEDDED
from speechtune.studio.reporting import MODEL, choices, recorder, reported
from speechtune.studio.workspace import Workspace

COLOURS = {"right": "#2e7d32", "replaced": "#c62828", "left out": "#ef6c00", "put in": "#6a1b9a"}


def build(workspace: Workspace, tab: gr.Tab) -> None:
    """Lay out the tab and connect it."""
    texts = own_sentences()
    run = gr.Dropdown(label="Run that assesses pronunciation", choices=[EMBEDDED], value=EMBEDDED)
    text = gr.Dropdown(label="Read aloud", choices=texts, value=texts[0], allow_custom_value=True)
    recording = recorder("Recording", "microphone", elem_id="pronounce-recording")
    score = gr.Button("Score", variant="primary", elem_id="pronounce-score")
    scores = gr.Dataframe(headers=["score", "value"], label="Scores, 0 to 10", elem_id="pronounce-scores")
    heard = gr.Textbox(label="Words as the model heard them", interactive=False)
    phones = gr.HighlightedText(label="Phones", color_map=COLOURS, show_legend=True, combine_adjacent=False)
    note = gr.Markdown()
    past = gr.Dataframe(label="Scores so far", wrap=True, elem_id="pronounce-history")

    def history() -> dict[str, Any]:
        rows = assessment.history(workspace)
        names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
        table = [[row["time"], row["text"], row["run"], *(row["scores"].get(name) for name in names)] for row in rows]
        return gr.update(value=table[::-1], headers=["time", "text", "run", *names])

    @reported
    def assess(run: str, text: str, recording: str | None) -> tuple[Any, ...]:
        chosen = None if run == EMBEDDED else run
        found = assessment.assess(Path(recording) if recording else None, text or "", chosen, workspace)
        unknown = f"Not in the dictionary: {', '.join(found.unknown_words)}. " if found.unknown_words else ""
        cut = "" if found.complete else "The model's answer was cut off or could not be read in full."
        table = [list(item) for item in found.scores.items()]
        return table, found.transcript or "", assessment.in_colour(found), unknown + cut, history()

    score.click(assess, [run, text, recording], [scores, heard, phones, note, past], concurrency_id=MODEL)
    tab.select(lambda run: choices([EMBEDDED, *workspace.names("runs", "config.yaml")], run), run, run)
    tab.select(history, None, past)
