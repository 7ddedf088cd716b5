"""Pages that are made of the code: one for each method, one for each recipe, and the reference of public names.

They are written to ``docs/generated`` when a build begins. A method's page is the docstrings of the modules that are
the method, word for word, and its recipes; so it cannot say anything else than the code does.
"""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lq
import lq.callbacks

DOCS = Path(__file__).parents[1]
FOLDER = DOCS / "generated"


@dataclass(frozen=True)
class Method:
    """A page: its title, the recipes that are the method, and the modules whose docstrings it consists of.

    A module is given by the end of its name; of several, the one with the shortest name is meant, and none of
    `lq.callbacks` unless it says so.
    """

    title: str
    recipes: tuple[str, ...]
    modules: tuple[str, ...]


METHODS = {
    "Widths for layers and channels": {
        "rdoq": Method("RDO-Q", ("rdoq",), ("metrics", "lagrangian", "allocation.allocate|bit_allocation")),
        "mpqco": Method("MPQCO", ("mpqco", "mpqco_finetune"), ("metrics", "one_pass", "greedy")),
        "hawq_v2": Method("HAWQ-V2", ("hawq_v2",), ("hawq", "exact")),
        "noise_scale": Method(
            "Noise scale and GDNSQ",
            ("noise_scale_w4a4", "noise_scale_w2a2", "noise_scale_free"),
            ("estimators.noise_scale", "noise_scale"),
        ),
        "progressive": Method("Widths that come down while training", (), ("callbacks.reduce_bits",)),
    },
    "Post-training reconstruction": {
        "adaround": Method("AdaRound", ("adaround",), ("adaround", "reconstruction.reconstruct")),
        "brecq": Method("BRECQ", ("brecq",), ("units", "fisher", "reconstruction.reconstruct")),
        "qdrop": Method("QDrop", ("qdrop",), ("drop", "reconstruction.reconstruct")),
        "mrecg": Method("MRECG", ("mrecg_modcap", "mrecg_loss"), ("granularity", "reconstruction.reconstruct")),
        "nwq": Method("NWQ", ("nwq",), ("softmax", "drop", "reconstruction.reconstruct")),
        "network_losses": Method(
            "APHQ-ViT, FIMA-Q and GLF-Q: losses of the network", (), ("aph", "dplr", "global_loss")
        ),
        "straight_through": Method("Weights themselves, straight through the rounding", (), ("rounding.ste",)),
        "mlp": Method("GELUs as ReLUs", (), ("callbacks.reconstruct_mlp",)),
        "vit": Method("Vision transformers", ("vit_w4a4",), ("preparation.prepare", "log_quantizer", "drop")),
        "feedback": Method("Error feedback (OBQ, GPTQ)", (), ("feedback",)),
        "best_ptq": Method("Best without training", ("best_ptq",), ("reconstruction.reconstruct",)),
    },
    "Ranges": {
        "lapq": Method("LAPQ", ("lapq",), ("loss_aware",)),
        "ranges": Method("Range rules", ("ptq_w8a8",), ("lp", "minmax", "percentile", "ranges.lsq")),
        "output": Method("Ranges by the output", (), ("output_ranges",)),
        "folding": Method("Folding of BatchNorms", (), ("folding",)),
        "preparation": Method("Channels brought to one range, exactly", (), ("preparation.prepare", "rotation")),
    },
    "Without data": {
        "zeroq": Method("ZeroQ", ("zeroq",), ("synthesis", "brute_force")),
    },
    "Fine-tuning": {
        "ste": Method("Straight-through", ("ste_w4a4",), ("estimators.ste",)),
        "lsq": Method("LSQ", ("lsq_w4a4", "lsq_w2a2"), ("estimators.lsq",)),
        "lsq_plus": Method("LSQ+", ("lsqplus_w2a2",), ("estimators.lsq_plus",)),
        "ewgs": Method("EWGS and adaptive EWGS", (), ("estimators.ewgs",)),
        "stableqat": Method("StableQAT", (), ("estimators.stableqat",)),
        "oscillations": Method(
            "Oscillations: iterative freezing and dampening",
            (),
            ("training.oscillations", "training.dampening", "callbacks.freeze_oscillations"),
        ),
        "distillation": Method("Distillation", (), ("distillation",)),
    },
}

#: Public names under headings; names that are new come under "More" by themselves.
GROUPS = {
    "Quantize": ("attach", "detach", "calibrate", "set_bits", "set_estimator", "fold_batchnorm", "load", "recipe"),
    "Look": ("inspect", "Structure", "summary", "compare", "Comparison", "recipe_names"),
    "Choose widths": ("measure_sensitivity", "Sensitivity", "allocate", "Allocation", "Latency", "QuantSpec"),
    "Fit without training": ("reconstruct", "Reconstruction", "optimize_ranges", "synthesize"),
    "Export": ("save", "export_onnx", "OnnxReport", "export_program", "integer_weights", "IntegerWeight"),
    "Errors and warnings": (
        *("LqError", "SpecError", "PatternError", "StateError", "DataError", "WriteError", "BudgetError"),
        *("RecipeError", "DivergenceError", "NoEffectWarning", "DivergenceWarning"),
    ),
}


def public(package: Any) -> dict[str, Any]:
    """The functions and classes that a package offers."""
    found = {name: getattr(package, name) for name in dir(package) if not name.startswith("_")}
    kinds = {name: value for name, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)}
    return {name: value for name, value in kinds.items() if value.__module__.split(".")[0] == "lq"}


def module_of(ending: str) -> Any:
    """The module with the shortest name that ends so; alternatives are parted by a bar.

    Raises:
        LookupError: if there is none.
    """
    names = [part.name for part in pkgutil.walk_packages(lq.__path__, "lq.")]
    for one in ending.split("|"):
        ours = [name for name in names if "callbacks" in one or not name.startswith("lq.callbacks.")]
        found = sorted((name for name in ours if name.endswith(f".{one}")), key=lambda name: name.count("."))
        if found:
            return importlib.import_module(found[0])
    raise LookupError(f"no module of lq ends in {ending!r}; mend METHODS in {__file__}")


def method_page(method: Method) -> str:
    """A method's page, as reStructuredText."""
    parts = [_title(method.title)]
    for ending in method.modules:
        module = module_of(ending)
        parts += [_title(f"``{module.__name__}``", "-"), inspect.getdoc(module) or "", ""]
    for name in method.recipes:
        parts += [_title(f"Recipe ``{name}``", "-"), _included(name, "../../..")]
    return "\n".join(parts)


def recipes_page() -> str:
    """All recipes, with what their headers say."""
    parts = [_title("Recipes"), _RECIPES]
    for name in lq.recipe_names():
        parts += [_title(f"``{name}``", "-"), _included(name, "../..")]
    return "\n".join(parts)


def methods_page() -> str:
    """The list of methods."""
    parts = [_title("Methods"), _METHODS]
    for group, methods in METHODS.items():
        listed = "\n".join(f"   {slug}" for slug in methods)
        parts += [_title(group, "-"), f".. toctree::\n   :maxdepth: 1\n\n{listed}\n"]
    return "\n".join(parts)


def reference_page() -> str:
    """Public names of `lq` and `lq.callbacks`, in groups."""
    ours, callbacks = public(lq), public(lq.callbacks)
    groups = {title: [name for name in names if name in ours] for title, names in GROUPS.items()}
    known = {name for names in groups.values() for name in names}
    groups["More"] = [name for name in ours if name not in known]
    parts = [_title("Reference"), _REFERENCE, _title("lq.callbacks", "-"), _summary("lq.callbacks", sorted(callbacks))]
    parts += [_title("lq", "-")]
    for title, names in groups.items():
        if names:
            parts += [_title(title, "~"), _summary("lq", names)]
    return "\n".join(parts)


_METHODS = """
Each page is what the code says of itself: the docstrings of the modules that are the method, with formula, source and
what deviates from it, and the recipes of that name with what was measured.
"""

_RECIPES = """
A recipe is a list of callbacks under a name: ``lq.recipe("qdrop", weights=3)``. Its header has the paper, when to use
it, what was measured, how long that took, and the command. :doc:`/which_recipe` says which to take. The files are in
``recipes/``.
"""

_REFERENCE = """
Everything public is in two places: ``lq`` has functions and never imports Lightning, ``lq.callbacks`` brings them into
a Trainer.
"""


def _summary(package: str, names: list[str]) -> str:
    listed = "\n".join(f"   {name}" for name in names)
    return f".. currentmodule:: {package}\n\n.. autosummary::\n   :toctree: .\n\n{listed}\n"


def _included(recipe: str, up: str) -> str:
    return f".. literalinclude:: {up}/recipes/{recipe}.yaml\n   :language: yaml\n"


def _title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n"


def pages() -> dict[str, str]:
    """All pages by their path in the folder."""
    found = {"recipes.rst": recipes_page(), "methods/index.rst": methods_page(), "api/index.rst": reference_page()}
    for methods in METHODS.values():
        found.update({f"methods/{slug}.rst": method_page(method) for slug, method in methods.items()})
    return found


def _write(app: Any, config: Any) -> None:
    for package in (lq, lq.callbacks):
        for value in public(package).values():
            value.__module__ = package.__name__  # where users import it from, and where its page is
    for name, text in pages().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # what is the same is not built again
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("config-inited", _write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
