"""The tab Train: a form made of the options, checks before the start, and the run while it goes on."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import gradio as gr

from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.families import load_config
from speechtune.studio import form, processes, progress
from speechtune.studio.form import BASIC, SHIPPED, Option
from speechtune.studio.reporting import MODEL, choices, player, reported
from speechtune.studio.workspace import Workspace

EVERY_SECONDS = 2.0
FIELD_WIDTH = 300  # pixels: as many stand side by side as fit
RECIPES = (processes.RECIPE_NAME, processes.CONFIG_NAME)  # either tells a run from another folder
CHECK_FOLDER = "checks"  # where the recipes of doctor and fit lie


def build(workspace: Workspace, tab: gr.Tab) -> None:
    """Lay out the tab and connect it."""
    with gr.Row():
        points = form.starting_points()
        start = gr.Dropdown(label="Start from", choices=points, value=SHIPPED, elem_id="train-start-from")
        name = gr.Textbox(label="Name of the run", placeholder="my_voice", elem_id="train-name")
    started = gr.Textbox(visible=False)

    @gr.render(inputs=start)
    def show_form(start: str) -> None:
        config = reported(form.start_from)(start, workspace)
        view = FormView(config, workspace)
        view.build(name, started)
        tab.select(view.offer, view.fields["data.train"], view.fields["data.train"])

    gr.Markdown("## Runs")
    with gr.Row():
        run = gr.Dropdown(label="Watch", choices=workspace.names("runs", *RECIPES), elem_id="train-watch")
        stop = gr.Button("Stop: finish the step, save, end", elem_id="train-stop")
        resume = gr.Button("Resume", elem_id="train-resume")
    state = gr.Markdown(elem_id="train-state")
    with gr.Row():
        losses = gr.LinePlot(x="step", y="value", color="curve", title="Training", height=260)
        evaluation = gr.LinePlot(x="step", y="value", color="curve", title="Evaluation", height=260)
    guards = gr.Dataframe(headers=["step", "kind", "message"], label="Guards and warnings", wrap=True)
    samples = gr.State([])
    scores = gr.Dataframe(headers=["score of the samples", "base", "last"], label="Scores", wrap=True)
    with gr.Accordion("What the run prints", open=False):
        log = gr.Code(label=processes.LOG_NAME, language=None, max_lines=20, wrap_lines=True)

    @gr.render(inputs=samples, triggers=[samples.change])
    def players(samples: list[tuple[str, str]]) -> None:
        for label, path in samples:
            player(label, path, elem_classes="sample")

    shown = [state, losses, evaluation, guards, samples, scores, log]

    @reported
    def look(name: str | None) -> tuple[Any, ...]:
        return tuple(progress.read_progress(name, workspace)) if name else tuple(gr.skip() for _ in shown)

    @reported
    def stop_run(name: str | None) -> None:
        gr.Info(f"process {processes.stop_run(workspace.run(name))} finishes its step, saves and ends")

    @reported
    def resume_run(name: str | None) -> None:
        config = load_config(processes.recipe_of(workspace.run(name)))
        gr.Info(f"process {processes.start_run(config, workspace.directory, resume=True)} goes on")

    def runs(chosen: str | None) -> dict[str, Any]:
        return choices(workspace.names("runs", *RECIPES), chosen)

    gr.Timer(EVERY_SECONDS).tick(look, run, shown, show_progress="hidden")
    run.change(look, run, shown, show_progress="hidden")
    stop.click(stop_run, run)
    resume.click(resume_run, run)
    started.change(runs, started, run)
    tab.select(runs, run, run)


class FormView:
    """The fields for one configuration, with the buttons that use their answers."""

    def __init__(self, config: RunConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        self.options = form.options_of(type(config))
        self.values = form.values_of(config, self.options)
        self.fields: dict[str, gr.Dropdown | gr.Textbox | gr.Checkbox] = {}

    def build(self, name: gr.Textbox, started: gr.Textbox) -> None:
        """Lay out fields and buttons; a run's name goes into `started` when it has begun."""
        given = dict(zip((option.name for option in self.options), self.values, strict=True))
        with gr.Row():
            for option in self.options:
                if option.name in BASIC:
                    self.add(option, given[option.name])
        folded = [option for option in self.options if option.name not in BASIC]
        for section, options in groupby(folded, key=lambda option: option.section):
            with gr.Accordion(f"More: {section}", open=False), gr.Row():
                for option in options:
                    self.add(option, given[option.name])
        with gr.Row():
            doctor = gr.Button("Doctor: check machine, files, data, one step", elem_id="train-doctor")
            fit = gr.Button("Estimate: memory and time", elem_id="train-fit")
            go = gr.Button("Train", variant="primary", elem_id="train-go")
        verdict = gr.Markdown(elem_id="train-verdict")
        found = gr.Dataframe(headers=["check", "", "result", "cure"], label="Doctor", wrap=True, visible=False)
        fields = [self.fields[option.name] for option in self.options]
        outputs = [verdict, *fields]
        doctor.click(self.answering(self.doctor), [name, *fields], [*outputs, found], concurrency_id=MODEL)
        fit.click(self.answering(self.fit), [name, *fields], [*outputs, found], concurrency_id=MODEL)
        go.click(self.answering(self.train), [name, *fields], [*outputs, started])

    def add(self, option: Option, value: str | bool) -> None:
        """Lay out one field."""
        common: dict[str, Any] = {"label": option.name, "info": option.help}
        common |= {"elem_id": f"option-{option.name.replace('.', '-')}", "min_width": FIELD_WIDTH}
        if option.name == "data.train":
            names = self.data_sets()
            chosen = str(value) or next(iter(names), None)
            field: Any = gr.Dropdown(names, value=chosen, allow_custom_value=True, **common)
        elif option.choices == form.YES_OR_NO:
            field = gr.Checkbox(bool(value), **common)
        elif option.choices:
            texts = map(form.shown, option.choices)
            field = gr.Dropdown([(text or "none", text) for text in texts], value=str(value), **common)
        else:
            field = gr.Textbox(str(value), **common)
        self.fields[option.name] = field

    def data_sets(self) -> list[str]:
        """The data to choose from, the newest first."""
        return [str(self.workspace.place("data", name)) for name in self.workspace.names("data")]

    def offer(self, chosen: str | None) -> dict[str, Any]:
        """An update of the data to choose from; the newest is chosen where none is."""
        names = self.data_sets()
        return gr.update(choices=names, value=chosen or next(iter(names), None))

    def answering(self, act: Callable[[RunConfig], tuple[str, Any]]) -> Callable[..., Any]:
        """A handler that reads the form, then acts; issues are shown at their fields."""

        @reported
        def handle(name: str, *answers: Any) -> list[Any]:
            run = self.workspace.place("runs", name)
            try:
                config = form.read_form(self.config.family, self.options, answers, run, self.workspace)
            except ConfigError as error:
                at, others = form.issues_by_option(error, self.options)
                lines = [f"**{len(at) + len(others)} issue(s) in the form**", *others, *map(": ".join, at.items())]
                return ["\n\n".join(lines), *self.marks(at), gr.skip()]
            line, last = act(config)
            return [line, *self.marks({}), last]

        return handle

    def marks(self, at: dict[str, str]) -> Sequence[dict[str, Any]]:
        """Updates that show each field's issue in place of its description."""
        return [
            gr.update(info=at.get(o.name, o.help), elem_classes=["invalid"] if o.name in at else [])
            for o in self.options
        ]

    def recipe(self, config: RunConfig) -> str:
        """The configuration as a file, for a command that reads it but trains nothing."""
        return processes.write_recipe(
            config, self.workspace.directory / CHECK_FOLDER / f"{config.output_dir.name}.yaml"
        )

    def doctor(self, config: RunConfig) -> tuple[str, Any]:
        """What `speechtune doctor` says."""
        rows = processes.run_verb(self.workspace.directory, "doctor", self.recipe(config))
        table = [[row["check"], row["verdict"], row["detail"], row["cure"]] for row in rows]
        failed = sum(row["verdict"] == "fail" for row in rows)
        line = f"Doctor: **{failed} check(s) failed**" if failed else "Doctor: every check passed"
        return line, gr.update(value=table, visible=True)

    def fit(self, config: RunConfig) -> tuple[str, Any]:
        """What `speechtune fit` measures."""
        found = processes.run_verb(self.workspace.directory, "fit", self.recipe(config))
        line = (
            f"Estimate on {found['device']}: {found['steps']} steps, **{found['hours'] * 60:.1f} minutes**, "
            f"{found['peak_bytes'] / 2**30:.2f} GiB at batch.tokens={found['tokens']}, "
            f"{found['audio_seconds_per_second']:.1f} s of audio a second (without evaluation and saving)"
        )
        return line, gr.skip()

    def train(self, config: RunConfig) -> tuple[str, Any]:
        """Start the run. Raises ConfigError: there is one of that name."""
        if any((config.output_dir / name).exists() for name in RECIPES):
            raise ConfigError(
                f"{config.output_dir.name}: there is a run of that name: resume it, or choose another name"
            )
        pid = processes.start_run(config, self.workspace.directory)
        return f"Process {pid} trains **{config.output_dir.name}**; it goes on when this page is closed.", (
            config.output_dir.name
        )
