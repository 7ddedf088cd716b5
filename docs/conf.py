"""Settings of the documentation: Sphinx with MyST, built without network by `make docs`."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext"), str(HERE.parent / "examples")]

import lq  # noqa: E402

warnings.filterwarnings("ignore", ".*LeafSpec.*")  # of Lightning about itself; it would stand in the gallery

project = "lq"
author = "The lq authors"
copyright = author
version = release = lq.__version__

extensions = [
    "generated_pages",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/**/*.ipynb", "gallery/**/*.py", "gallery/**/*.json", "gallery/**/*.zip"]
templates_path = ["_templates"]
default_role = "py:obj"

# Names of other libraries have no pages here, and nothing is downloaded to find theirs. Single backticks in docstrings
# name inner modules too, which have no pages either.
nitpick_ignore_regex = [("py:obj", ".*"), ("py:.*", r"(?!lq\.).*"), ("py:.*", r"lq\.[a-z_]+\..*")]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": ["../examples/gallery"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/plot_",
    "plot_gallery": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1000,
    "write_computation_times": False,
    "remove_config_comments": True,
}

html_theme = "furo"
html_title = f"lq {version}"
html_static_path = ["_static"]
html_css_files = ["lq.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#6d28d9", "color-brand-content": "#6d28d9"},
    "dark_css_variables": {"color-brand-primary": "#b794f6", "color-brand-content": "#b794f6"},
}
