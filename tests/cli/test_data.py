"""The data modules: which images, which labels, what they are made into, and how wrong folders are told."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from lq.cli.data import DigitsData, ImageData, ImageFolderData, TorchvisionData
from lq.errors import DataError
from tests.cli.running import SILENT

pytestmark = SILENT

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
PLAIN = {"input_size": (3, 8, 8), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}


def images(root, counts, mode="RGB"):
    """Folders of images, each of the colour that it is named after."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 10), COLOURS.get(name, (9, 9, 9))).convert(mode).save(root / name / f"{index}.png")
    return root


def read(loader):
    """All images and labels of a loader."""
    parts = list(loader)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def ready(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folders_of_classes_hold_out_every_fifth_image_of_each(tmp_path):
    folder = images(tmp_path / "photos", {"red": 10, "blue": 6, "green": 5})
    data = ready(ImageFolderData(folder, workers=0, batch_size=4, data_config=PLAIN))
    assert data.classes == ["blue", "green", "red"]
    x, y = read(data.val_dataloader())
    assert y.tolist() == [0, 1, 2, 2] and x.shape == (4, 3, 8, 8)
    for image, label in zip(x, y, strict=True):
        assert torch.equal(image.mean((1, 2)), torch.tensor(COLOURS[data.classes[label]]) / 255)
    assert len(read(data.train_dataloader())[1]) == 21 - 4
    assert torch.equal(read(data.test_dataloader())[0], x) and torch.equal(read(data.predict_dataloader())[0], x)


def test_folders_of_parts(tmp_path):
    counts = {"train": {"red": 3, "blue": 3}, "validation": {"red": 1, "blue": 1}, "test": {"red": 2, "blue": 0}}
    for part, found in counts.items():
        images(tmp_path / part, found)
    data = ready(ImageFolderData(tmp_path, workers=0, data_config=PLAIN))
    assert read(data.train_dataloader())[1].sort().values.tolist() == [0, 0, 0, 1, 1, 1]
    assert read(data.val_dataloader())[1].tolist() == [0, 1]
    assert read(data.test_dataloader())[1].tolist() == [1, 1]


def test_classes_in_the_order_of_the_models_outputs(tmp_path):
    folder = images(tmp_path / "photos", {"red": 5, "blue": 5})
    (tmp_path / "names.txt").write_text("red\nyellow\n\nblue\n")
    for classes in (["red", "yellow", "blue"], tmp_path / "names.txt"):
        data = ready(ImageFolderData(folder, classes, workers=0, data_config=PLAIN))
        x, y = read(data.val_dataloader())
        assert {label: tuple((255 * x[y == label][0].mean((1, 2))).int().tolist()) for label in y.tolist()} == {
            0: COLOURS["red"],
            2: COLOURS["blue"],
        }


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_pictures_of_other_modes(mode, tmp_path):
    folder = images(tmp_path / "photos", {"red": 5}, mode)
    assert read(ready(ImageFolderData(folder, workers=0, data_config=PLAIN)).val_dataloader())[0].shape == (1, 3, 8, 8)
    gray = {**PLAIN, "input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}
    assert read(ready(ImageFolderData(folder, workers=0, data_config=gray)).val_dataloader())[0].shape == (1, 1, 8, 8)


def test_images_are_varied_only_in_training(tmp_path):
    folder = tmp_path / "noise" / "one"
    folder.mkdir(parents=True)
    for index in range(5):
        noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")

    def epochs(**options):
        data = ready(ImageFolderData(folder.parent, workers=0, data_config=PLAIN, **options))
        return [
            float(read(loader())[0].sum()) for loader in (data.train_dataloader, data.val_dataloader) for _ in range(2)
        ]

    torch.manual_seed(0)
    varied, plain = epochs(augment=True), epochs()
    assert varied[0] != varied[1] and varied[2] == varied[3] == plain[2]
    assert plain[0] == pytest.approx(plain[1], rel=1e-6)


FOLDERS = {
    "nowhere": (lambda root: None, "there is no folder .*photos"),
    "misspelt": (lambda root: images(root.parent / "photo", {"red": 1}), "no folder .*photos; did you mean photo"),
    "empty": (lambda root: root.mkdir(), "has no folders of images: expected .*/CLASS/IMAGE or .*/train/CLASS/IMAGE"),
    "no images": (lambda root: images(root, {"red": 0, "blue": 0}), "photos has no images: expected .*/CLASS/IMAGE"),
    "too few": (lambda root: images(root, {"red": 2}), "has too few images to hold some out; make .*/train and .*/val"),
    "no class": (lambda root: images(root / "train", {"red": 5, "bleu": 1}), "'bleu', which is none of the 2 classes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_wrong_folders(kind, tmp_path):
    make, message = FOLDERS[kind]
    make(tmp_path / "photos")
    with pytest.raises(DataError, match=message) as raised:
        ready(ImageFolderData(tmp_path / "photos", ["red", "blue"] if kind == "no class" else None, workers=0))
    assert "\n" not in str(raised.value)


def test_no_part_for_training(tmp_path):
    images(tmp_path / "val", {"red": 2})
    data = ready(ImageFolderData(tmp_path, workers=0, data_config=PLAIN))
    assert len(read(data.val_dataloader())[1]) == 2
    with pytest.raises(DataError, match="has no part for 'train'; it has val"):
        data.train_dataloader()


# --- torchvision ------------------------------------------------------------------------------------------------------


def write_mnist(root, name="FashionMNIST", counts=(30, 10)):
    """Files as torchvision's MNIST and FashionMNIST have them."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, count in zip(("train", "t10k"), counts, strict=True):
        pixels = np.arange(count, dtype=np.uint8)[:, None, None] + np.zeros((count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        packed = {
            "images-idx3-ubyte": struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes(),
            "labels-idx1-ubyte": struct.pack(">II", 2049, count) + labels.tobytes(),
        }
        for kind, content in packed.items():
            (folder / f"{part}-{kind}").write_bytes(content)
            (folder / f"{part}-{kind}.gz").write_bytes(gzip.compress(content))
    return root


def test_a_data_set_of_torchvision(tmp_path):
    data = ready(TorchvisionData("FashionMNIST", write_mnist(tmp_path), workers=0, data_config=PLAIN, augment=False))
    assert len(data.classes) == 10
    x, y = read(data.val_dataloader())
    assert x.shape == (10, 3, 8, 8) and y.tolist() == list(range(10))
    assert torch.allclose(x[:, :, 0, 0] * 255, torch.arange(10.0)[:, None].expand(-1, 3), atol=1e-3)
    assert len(read(data.train_dataloader())[1]) == 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFR10", r"torchvision has no data set 'CIFR10'; did you mean CIFAR10, CIFAR100"),
        ("CocoDetection", "CocoDetection has no part for training; put its images in folders, for ImageFolderData"),
        ("FakeData", "FakeData has no part for training"),
    ],
)
def test_other_names(name, message):
    with pytest.raises(DataError, match=message):
        TorchvisionData(name)


@pytest.mark.parametrize(
    "name", ["CIFAR10", "FashionMNIST", "Flowers102", "OxfordIIITPet", "ImageNet", "SVHN", "Food101"]
)
def test_nothing_is_downloaded(name, tmp_path, monkeypatch):
    def connects(*args, **kwargs):
        raise AssertionError("it went to the network")

    monkeypatch.setattr("urllib.request.urlopen", connects)
    with pytest.raises(DataError, match=rf"torchvision's {name} is not in .*; give the folder .*--data.download true"):
        ready(TorchvisionData(name, tmp_path / "data", workers=0))


# --- digits, and all of them ------------------------------------------------------------------------------------------


def test_digits():
    data = ready(DigitsData(image_size=16))
    x, y = read(data.val_dataloader())
    assert x.shape == (360, 3, 16, 16) and set(y.tolist()) == set(range(10))
    assert len(read(data.train_dataloader())[1]) == 1797 - 360
    gray = ready(DigitsData(image_size=8, data_config={"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}))
    x, y = read(gray.val_dataloader())
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images).float() / 16
    assert all((pixels == image[0]).all((1, 2)).any() for image in x[:5])


def test_images_are_those_of_the_model(tmp_path):
    """timm's own transform of the model is the oracle."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from lq.cli.timm_module import TimmClassifier

    folder = images(tmp_path / "photos", {"red": 5, "blue": 5})
    module = TimmClassifier("test_vit", num_classes=2)
    data = ImageFolderData(folder, workers=0, data_config=module.data_config)
    x, _ = read(ready(data).val_dataloader())
    own = create_transform(**resolve_model_data_config(timm.create_model("test_vit")), is_training=False)
    assert torch.equal(x[0], own(Image.open(folder / "blue" / "4.png").convert("RGB")))
    small = ready(ImageFolderData(folder, workers=0, image_size=32, data_config=module.data_config))
    assert read(small.val_dataloader())[0].shape[2:] == (32, 32)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}, {"image_size": 0}])
def test_wrong_numbers(options):
    (name,) = options
    with pytest.raises(DataError, match=rf"{name}=.*: expected . or more"):
        DigitsData(**options)


def test_other_classes_than_the_models():
    data = ready(DigitsData())
    data.require_classes(10)
    data.require_classes(None)
    with pytest.raises(DataError, match=r"digits has 10 classes, the model has 1000; .* \(--model.num_classes 10\)"):
        data.require_classes(1000)


def test_they_are_of_one_kind():
    assert all(issubclass(kind, ImageData) for kind in (DigitsData, ImageFolderData, TorchvisionData))
