"""How Sphinx builds the site: `make docs`."""

import tempfile
import tomllib
import zlib
from pathlib import Path

import tnt_optax

HERE = Path(__file__).parent
settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project = "tnt_optax"
version = release = tnt_optax.__version__
author = copyright = "the authors of tnt_optax"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.extlinks",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["results", "notebooks/*.md"]  # The texts of the notebooks; the site shows the notebooks.

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # `make notebooks` runs the notebooks, and their outputs are committed.
repository = settings["urls"]["Repository"]
colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
extlinks = {"colab": (f"{colab}/blob/main/examples/notebooks/%s.ipynb", "Open in Colab%.0s")}

default_role = "code"  # Docstrings have code in single backticks.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # Docstrings describe the arguments.
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {
    "repository_url": repository,
    "use_repository_button": True,
    "show_navbar_depth": 1,
    "home_page_in_toc": False,
    "navbar_persistent": [],  # The sidebar has the search.
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def inventory(name: str) -> str:
    """The inventory of another project's names, from a list in the repository: a build needs no network."""
    lines = (HERE / f"inventories/{name}.txt").read_text()
    header = (
        f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The remainder is compressed using zlib.\n"
    )
    path = Path(tempfile.mkdtemp(), f"{name}.inv")
    path.write_bytes(header.encode() + zlib.compress(lines.encode()))
    return str(path)


intersphinx_mapping = {
    "jax": ("https://docs.jax.dev/en/latest", inventory("jax")),
    "optax": ("https://optax.readthedocs.io/en/latest", inventory("optax")),
    "flax": ("https://flax.readthedocs.io/en/latest", inventory("flax")),
}
