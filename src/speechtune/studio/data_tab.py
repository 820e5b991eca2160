"""The tab Data: add recordings, see every issue, listen, correct transcripts, record sentences."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from speechtune.preparation.coverage import own_sentences
from speechtune.studio import datasets
from speechtune.studio.reporting import MODEL, choices, frame, player, recorder, reported
from speechtune.studio.workspace import Workspace

COLUMNS = ["row", "transcript", "issues", "file"]
RECOGNISER = "pocketsphinx"  # needs no download
NUMBER = re.compile(r"\d+(\.0)?")  # rows that a page adds by itself have none
SENTENCES = own_sentences()


def build(workspace: Workspace, tab: gr.Tab) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown("Recordings of a voice and what is said in them. Use a voice only with its owner's consent.")
    with gr.Row():
        name = gr.Textbox(label="Name of the data set", placeholder="my_voice", elem_id="data-name")
        path = gr.Textbox(
            label="Data that lie in a folder the studio may read",
            info="A manifest or a folder in any layout of docs/data.md, given at start with --allow.",
        )
    with gr.Row():
        files = gr.File(label="Recordings, transcripts, a manifest", file_count="multiple", elem_id="data-files")
        folder = gr.File(label="A folder of them", file_count="directory")
    add = gr.Button("Add", variant="primary", elem_id="data-add")
    chosen = gr.Dropdown(
        label="Data set",
        info="Or the path of data in a folder that the studio may read: they can be checked and heard.",
        choices=workspace.names("data"),
        allow_custom_value=True,
        elem_id="data-set",
    )
    then_check = _rows_and_issues(workspace, chosen)
    with gr.Accordion("Cut long recordings into a data set", open=False, elem_id="prepare"):
        _preparation(workspace, name, chosen, then_check)
    with gr.Accordion("Record sentences", open=False):
        _sentences(workspace, name, chosen)

    @reported
    def add_data(name: str, path: str, files: list[str] | None, folder: list[str] | None) -> tuple[Any, ...]:
        place = workspace.place("data", name)
        uploads = [Path(file) for file in (*(files or ()), *(folder or ()))]
        if path.strip():
            datasets.import_rows(workspace.readable(path.strip()), place)
        if uploads:
            datasets.add_files(place, uploads)
        return None, None, "", choices(workspace.names("data"), name)

    def offer(name: str | None) -> dict[str, Any]:
        names = workspace.names("data")
        return gr.update(choices=names, value=name or next(iter(names), None))

    then_check(add.click(add_data, [name, path, files, folder], [files, folder, path, chosen]))
    tab.select(offer, chosen, chosen)


def _rows_and_issues(workspace: Workspace, chosen: gr.Dropdown) -> Callable[[Dependency], object]:
    """Lay out what is known of the chosen data set; what makes an event that has changed it show it anew."""
    check = gr.Button("Check", elem_id="data-check")
    verdict = gr.Markdown(elem_id="data-verdict")
    with gr.Row():
        issues = gr.Dataframe(
            headers=["where", "sample", "issue", "message"], label="Issues", interactive=False, wrap=True
        )
        statistics = gr.Dataframe(
            headers=["what", "value"], label="Statistics", interactive=False, wrap=True, elem_id="data-statistics"
        )
    rows = gr.Dataframe(
        headers=COLUMNS,
        label="Rows: choose one to listen; transcripts can be corrected here",
        static_columns=[0, 2, 3],
        interactive=True,
        wrap=True,
        column_widths=["10%", "40%", "35%", "15%"],
        elem_id="data-rows",
    )
    clip = player("The chosen row", elem_id="data-player")
    save = gr.Button("Keep the corrected transcripts", elem_id="data-save")

    def data_set(name: str | None) -> Path:
        return workspace.readable(name) if name and "/" in name else workspace.place("data", name)

    @reported
    def examine(name: str | None) -> tuple[Any, ...]:
        found = datasets.check(data_set(name), workspace)
        listed = [(i.source, i.sample_id, i.code, i.message) for i in found.issues]
        utterances = datasets.utterances(data_set(name), found, workspace)
        table = [(u.number, u.text, u.issues, u.clip.name if u.clip else "") for u in utterances]
        line = "\n\n".join([f"**{len(listed)} issue(s)**" if listed else "**No issues**", *found.notes])
        return line, listed, datasets.statistics_rows(found), table

    @reported
    def correct(name: str | None, table: Any) -> None:
        rows = zip(map(str, table["row"]), table["transcript"], strict=True)
        texts = {int(float(row)): str(text or "") for row, text in rows if NUMBER.fullmatch(row)}
        datasets.correct(workspace.place("data", name), texts, workspace)

    @reported
    def listen(name: str | None, event: gr.SelectData) -> str | None:
        number, utterances = int(event.row_value[0]), datasets.utterances(data_set(name), None, workspace)
        return next((str(u.clip) for u in utterances if u.number == number and u.clip), None)

    shown = [verdict, issues, statistics, rows]
    check.click(examine, chosen, shown)
    rows.select(listen, chosen, clip)
    save.click(correct, [chosen, rows]).success(examine, chosen, shown)
    return lambda event: event.success(examine, chosen, shown)


def _preparation(
    workspace: Workspace, name: gr.Textbox, chosen: gr.Dropdown, then_check: Callable[[Dependency], object]
) -> None:
    """Lay out `speechtune prepare`, and connect it."""
    with gr.Row():
        raw = gr.File(label="Recordings of any length", file_count="multiple", elem_id="prepare-files")
        script = gr.File(label="What was to be said, a line a sentence (optional)", elem_id="prepare-script")
    with gr.Row():
        raw_path = gr.Textbox(label="or where they lie", info="In a folder given at start with --allow.")
        asr = gr.Textbox(RECOGNISER, label="Recogniser", info="Such as faster-whisper:base.en.", elem_id="prepare-asr")
        language = gr.Textbox(label="Language", placeholder="detected", elem_id="prepare-language")
    cut = gr.Button("Prepare: cut, transcribe, check", elem_id="prepare-go")
    outcome = gr.Markdown(elem_id="prepare-verdict")
    page = gr.HTML()

    @reported
    def prepare(
        name: str, raw: list[str] | None, place: str, asr: str, language: str, script: str | None
    ) -> tuple[Any, ...]:
        verdict, report = datasets.prepare(
            name,
            [Path(file) for file in raw or ()],
            place.strip(),
            workspace,
            asr=asr.strip(),
            language=language.strip(),
            script=Path(script) if script else None,
        )
        return verdict, frame(report), choices(workspace.names("data"), name)

    asked = [name, raw, raw_path, asr, language, script]
    then_check(cut.click(prepare, asked, [outcome, page, chosen], concurrency_id=MODEL))


def _sentences(workspace: Workspace, name: gr.Textbox, chosen: gr.Dropdown) -> None:
    """Lay out sentences to read and the microphone, and connect them."""
    sentence = gr.Dropdown(label="Read aloud", choices=SENTENCES, value=SENTENCES[0], allow_custom_value=True)
    recording = recorder("Recording", "microphone")
    keep = gr.Button("Keep the recording, go on to the next sentence")

    @reported
    def keep_recording(name: str, sentence: str, recording: str | None) -> tuple[Any, ...]:
        datasets.add_recording(workspace.place("data", name), Path(recording) if recording else None, sentence)
        following = SENTENCES.index(sentence) + 1 if sentence in SENTENCES else 0
        return None, SENTENCES[following % len(SENTENCES)], choices(workspace.names("data"), name)

    keep.click(keep_recording, [name, sentence, recording], [recording, sentence, chosen])
