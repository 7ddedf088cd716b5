"""What tests of exported files share."""

import pytest

import lq
from lq.export import export_onnx
from tests.export.damage import saved_model
from tests.export.exported import calibrated
from tests.export.nets import FILES, File
from tests.models import state


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files of `nets.FILES` by name, exported when they are first asked for; models and files are not to be changed."""
    made: dict[str, File] = {}

    def get(name: str) -> File:
        if name not in made:
            build, options, export = FILES[name]
            (model, x), options = build(), dict(options)
            change = options.pop("change", None)
            calibrated(model, x, **options)
            if change is not None:
                change(model)
            before = state(model)
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            made[name] = File(path, model, x, export_onnx(model, x[:2], path, check=[x], **export), before)
        return made[name]

    return get


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A model and the content of its packed file."""
    model = saved_model()
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    lq.save(model, path)
    return model, path.read_bytes()
