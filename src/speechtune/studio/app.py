"""The page of the studio, and its server on this machine alone."""

import os
import tempfile
from pathlib import Path
from types import ModuleType

import gradio as gr
from gradio.themes import Default
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from speechtune.audio import MAX_FILE_BYTES
from speechtune.studio import data_tab, listen_tab, pronounce_tab, runs_tab, train_tab
from speechtune.studio.workspace import Workspace

TABS: dict[str, ModuleType] = {
    "Data": data_tab,
    "Train": train_tab,
    "Listen": listen_tab,
    "Pronounce": pronounce_tab,
    "Runs": runs_tab,
}
LOOPBACK = "127.0.0.1"
HOSTS = [LOOPBACK, "localhost"]
DAY_SECONDS = 24 * 3600
FONTS = ("system-ui", "sans-serif")
"""Of the machine: Gradio's own themes fetch theirs."""
STYLE = """
.invalid, .invalid input, .invalid textarea { border-color: #c62828 !important; }
.invalid [data-testid="block-info"] + *, .invalid .wrap > div { color: #c62828; }
iframe.report { width: 100%; height: 80vh; border: 0; background: white; }
"""


def build(workspace: Workspace) -> gr.Blocks:
    """The page, all tabs connected."""
    with gr.Blocks(title="speechtune studio", analytics_enabled=False, delete_cache=(DAY_SECONDS, DAY_SECONDS)) as page:
        gr.Markdown(f"# speechtune studio\nEverything is written to `{workspace.directory}`.")
        with gr.Tabs():
            for name, module in TABS.items():
                with gr.Tab(name, id=name, elem_id=f"tab-{name.lower()}") as tab:
                    module.build(workspace, tab)
    return page


def serve(workspace: Workspace, port: int | None, *, block: bool = True) -> tuple[gr.Blocks, str]:
    """Serve the page on loopback; its address. With `block` this returns when the server ends.

    Temporary files, those of runs too, go into the studio's folder: nothing is written outside it.
    """
    prepare_folder(workspace.directory)
    page = build(workspace)
    theme = Default(font=FONTS, font_mono=("monospace",))
    theme.set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")  # else hard to read
    _, address, _ = page.queue().launch(
        server_name=LOOPBACK,
        server_port=port,
        share=False,
        prevent_thread_lock=not block,
        allowed_paths=[str(folder) for folder in workspace.roots if folder != workspace.directory.resolve()],
        max_file_size=MAX_FILE_BYTES,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        # A page elsewhere could let a name of its own point here, and would then be taken for this one.
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]},
        theme=theme,
        css=STYLE,
    )
    return page, address


def prepare_folder(directory: Path) -> None:
    """Make the studio's folder the current one, and the place of all temporary files."""
    temporary = directory.resolve() / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ |= {"GRADIO_TEMP_DIR": str(temporary / "gradio"), "TMPDIR": str(temporary)}
    tempfile.tempdir = str(temporary)
    os.chdir(directory)
