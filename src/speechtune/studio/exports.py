"""Adapters of a studio's runs, merged into their base or packed into one file."""

import shutil
from pathlib import Path

from speechtune.errors import AdapterError, ConfigError
from speechtune.export.verify import verify_adapter
from speechtune.lora.files import adapter_folder
from speechtune.studio.processes import run_verb
from speechtune.studio.workspace import Workspace


def _adapter(run: str | None, name: str | None, workspace: Workspace) -> Path:
    folder = workspace.run(run)
    if not name:
        raise ConfigError("choose an adapter or a checkpoint")
    return adapter_folder(workspace.readable(folder / workspace.place("runs", name).name))


def merge(run: str | None, name: str | None, strength: float, workspace: Workspace) -> str:
    """Merge as `speechtune merge` does, into a new folder of `exports`; what was measured.

    Raises SpeechtuneError: as the verb, or the folder is there already.
    """
    adapter = _adapter(run, name, workspace)
    suffix = "" if strength == 1 else f"-strength-{strength:g}"
    output = workspace.place("exports", f"{run}-{name}{suffix}-merged")
    if output.exists():
        raise ConfigError(f"{output}: there already")
    output.parent.mkdir(parents=True, exist_ok=True)
    strengths = [] if strength == 1 else ["--strength", f"{strength:g}"]
    report = run_verb(workspace.directory, "merge", str(adapter), str(output), *strengths)
    return (
        f"Merged into `{output}`: the adapter moves the base's logits by up to {report['adapter_effect']:.3g}, "
        f"merged and adapter-on logits differ by up to {report['merged_difference']:.1e}, greedy codes are equal"
    )


def export(run: str | None, name: str | None, workspace: Workspace) -> tuple[str, Path]:
    """Verify an adapter and pack its folder into `exports`; what was checked, and the file.

    Raises AdapterError: it is not valid.
    """
    adapter = _adapter(run, name, workspace)
    verified = verify_adapter(adapter, look_up_base=False)
    if not verified.valid:
        raise AdapterError(f"{adapter}: " + "; ".join(verified.issues))
    output = workspace.place("exports", f"{run}-{name}.zip")
    output.parent.mkdir(parents=True, exist_ok=True)
    path = Path(shutil.make_archive(str(output.with_suffix("")), "zip", adapter))
    return f"{len(verified.checks)} checks passed; packed into `{path}`", path
