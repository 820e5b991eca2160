"""The tab Runs: the report of each, two side by side, and a checkpoint merged or exported."""

from typing import Any

import gradio as gr

from speechtune.commands.report import write_report
from speechtune.studio import exports, progress
from speechtune.studio.listen_tab import MAX_STRENGTH
from speechtune.studio.listening import voices_of
from speechtune.studio.reporting import MODEL, choices, frame, reported
from speechtune.studio.workspace import Workspace


def build(workspace: Workspace, tab: gr.Tab) -> None:
    """Lay out the tab and connect it."""
    with gr.Row():
        run = gr.Dropdown(label="Run", choices=[], elem_id="runs-run")
        other = gr.Dropdown(label="Compare with", choices=[], elem_id="runs-other")
    with gr.Row():
        show = gr.Button("Report", variant="primary", elem_id="runs-report")
        compare = gr.Button("Compare the two", elem_id="runs-compare")
    checkpoints = gr.Dataframe(
        headers=["checkpoint", "evaluation loss", "", "checked"], label="Checkpoints", wrap=True, interactive=False
    )
    chosen = gr.Dropdown(label="Adapter or checkpoint", choices=[], elem_id="runs-checkpoint")
    with gr.Row():
        strength = gr.Slider(
            0, MAX_STRENGTH, 1, step=0.05, label="Strength", info="Of the adapter in the merged model."
        )
        merge = gr.Button("Merge into its base", elem_id="runs-merge")
        export = gr.Button("Export the adapter as zip", elem_id="runs-export")
    done = gr.Markdown(elem_id="runs-done")
    file = gr.File(label="Exported", interactive=False, elem_id="runs-file")
    page = gr.HTML(elem_id="runs-page")

    @reported
    def report(*names: str | None) -> str:
        folders = [workspace.run(name) for name in names]
        out = workspace.directory / "reports" / f"{'-'.join(folder.name for folder in folders)}.html"
        out.parent.mkdir(parents=True, exist_ok=True)
        _, path = write_report(folders, out)
        return frame(path.read_text(encoding="utf-8"))

    @reported
    def offer(name: str | None) -> tuple[Any, ...]:
        if not name:
            return [], choices([])
        return progress.checkpoints(workspace.report(name)), choices(voices_of(name, workspace)[1:])

    @reported
    def merge_one(name: str | None, adapter: str | None, strength: float) -> str:
        return exports.merge(name, adapter, float(strength), workspace)

    @reported
    def export_one(name: str | None, adapter: str | None) -> tuple[str, str]:
        line, path = exports.export(name, adapter, workspace)
        return line, str(path)

    def runs(name: str | None, other: str | None) -> tuple[Any, Any]:
        names = workspace.names("runs", "config.yaml")
        return choices(names, name), choices(names, other)

    run.change(offer, run, [checkpoints, chosen])
    show.click(report, run, page)
    compare.click(report, [run, other], page)
    merge.click(merge_one, [run, chosen, strength], done, concurrency_id=MODEL)
    export.click(export_one, [run, chosen], [done, file])
    tab.select(runs, [run, other], [run, other])
