"""`speechtune recipes`: the recipes that come with the package, listed, printed, or copied to be changed."""

import json
from pathlib import Path

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
    if as_json:
        rows = [{"name": recipe, "about": about[recipe], "text": recipes[recipe]} for recipe in chosen]
        print(json.dumps(rows, ensure_ascii=False))
    elif out is not None:
        print(f"{out}: written; change what is yours, and start `speechtune doctor {out}`")
    elif name is not None:
        print(recipes[name], end="")
    else:
        width = max(map(len, recipes))
        print("\n".join(f"{recipe:{width}}  {about[recipe]}" for recipe in chosen))
    return 0
