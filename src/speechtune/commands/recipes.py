"""`speechtune recipes`: the recipes that come with the package, listed, printed, or copied to be changed."""

from pathlib import Path

from speechtune.commands import print_result
from speechtune.config import shipped_recipes
from speechtune.errors import ConfigError


def run_recipes(name: str | None = None, out: Path | None = None, *, as_json: bool = False) -> int:
    """List all recipes with their first comment line, or print the recipe `name`, or copy it to `out`; 0."""
    recipes = {path.stem: path.read_text(encoding="utf-8") for path in shipped_recipes().values()}
    if name is None and out is not None:
        raise ConfigError("--out: name the recipe to copy, one of " + ", ".join(recipes))
    if name is not None and name not in recipes:
        raise ConfigError(f"{name}: no such recipe; there are " + ", ".join(recipes))
    if name is not None and out is not None:
        try:
            with out.open("x", encoding="utf-8") as file:
                file.write(recipes[name])
        except FileExistsError:
            raise ConfigError(f"{out}: exists already; name a new file") from None
    about = {recipe: text.partition("\n")[0].removeprefix("# ") for recipe, text in recipes.items()}
    chosen = list(recipes) if name is None else [name]
    rows = [{"name": recipe, "about": about[recipe], "text": recipes[recipe]} for recipe in chosen]
    width = max(map(len, recipes))
    lines = [f"{recipe:{width}}  {about[recipe]}" for recipe in chosen]
    if out is not None:
        lines = [f"{out}: written; change what is yours, and start `speechtune doctor {out}`"]
    elif name is not None:
        lines = recipes[name].splitlines()
    return print_result(rows, lines, as_json)
