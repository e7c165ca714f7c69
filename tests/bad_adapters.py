"""Adapters that are not sound, by what is wrong with them, and what the reader says."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from adapters import edit
from safetensors.torch import load_file, save_file

from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME

Damage = Callable[[Path], object]
PIXELS = {"mean": [0.5], "std": [0.25], "bgr": False, "input_size": [1, 8, 8]}


def config(change) -> Damage:
    return lambda folder: edit(folder, change)


def text(content: str) -> Damage:
    return lambda folder: (folder / CONFIG_NAME).write_bytes(content.encode("latin-1"))


def tensors(change) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / TENSORS_NAME)
        change(found)
        save_file(found, folder / TENSORS_NAME)

    return damage


def pickled(*, zipped: bool) -> Damage:
    found = {"act1@in.mean": torch.ones(4, 1, 1)}
    return lambda folder: torch.save(
        found, folder / TENSORS_NAME, _use_new_zipfile_serialization=zipped
    )


def halved(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def enlarged(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def twice(folder: Path) -> None:
    path = folder / CONFIG_NAME
    path.write_text(path.read_text().replace("{", '{"center": "zero",', 1))


def tensor_twice(folder: Path) -> None:
    path = folder / TENSORS_NAME
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    again = b'{"act1@in.mean":{"dtype":"F32","shape":[4,1,1],"data_offsets":[0,16]},'
    header = again + data[9:end]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def pipe(folder: Path) -> None:
    (folder / TENSORS_NAME).unlink()
    os.mkfifo(folder / TENSORS_NAME)


def site(**values) -> Damage:
    return config(lambda c: c["sites"][0].update(values))


def base(**values) -> Damage:
    return config(lambda c: c["base"].update(values))


def top(**values) -> Damage:
    return config(lambda c: c.update(values))


BAD: dict[str, tuple[Damage, str]] = {
    # Files
    "no config": (lambda folder: (folder / CONFIG_NAME).unlink(), "json is missing"),
    "no tensors": (lambda folder: (folder / TENSORS_NAME).unlink(), "safetensors is missing"),
    "a pipe for a file": (pipe, "safetensors is missing"),
    "config cut short": (halved(CONFIG_NAME), "not valid JSON"),
    "tensors cut short": (halved(TENSORS_NAME), "not a valid safetensors file"),
    "config of 9 MB": (enlarged(CONFIG_NAME, 9 * 2**20), "has 9,437,184 bytes, more than"),
    "tensors of 300 MB": (enlarged(TENSORS_NAME, 300 * 2**20), "has 314,572,800 bytes, more than"),
    "tensors and config of two adapters": (top(tensors_sha256="0"), "do not belong together"),
    "a pickle for safetensors": (pickled(zipped=True), "is a pickle.*not opened"),
    "an old pickle for safetensors": (pickled(zipped=False), "is a pickle.*not opened"),
    "noise for safetensors": (
        lambda folder: (folder / TENSORS_NAME).write_bytes(bytes(range(256))),
        "not a valid safetensors file",
    ),
    # JSON
    "an empty config": (text(""), "not valid JSON"),
    "a list for an object": (text("[1]"), "expected a JSON object, got list"),
    "null for an object": (text("null"), "expected a JSON object, got NoneType"),
    "not UTF-8": (text("\xff"), "not valid JSON"),
    "a key twice": (twice, "the key 'center' stands there twice"),
    "a key twice further in": (text('{"a": [{"b": 1, "b": 1}]}'), "the key 'b' stands there twice"),
    "NaN in JSON": (text('{"format_version": NaN}'), "NaN is not a finite number"),
    "a number beyond a float": (text('{"format_version": 1e999}'), "1e999 is not a finite number"),
    "a number of 5,000 digits": (text("9" * 5000), "not valid JSON"),
    "a hundred thousand brackets": (text("[" * 100_000), "not valid JSON"),
    "half a character": (top(calibration={"a": "\ud800"}), "not valid JSON"),
    # Version
    "a newer version": (top(format_version=3), "format_version is 3.*up to 2. Upgrade"),
    "a version in words": (top(format_version="1"), "format_version must be 1 to 2, got '1'"),
    "true for a version": (top(format_version=True), "format_version must be 1 to 2, got True"),
    "no version": (config(lambda c: c.pop("format_version")), "format_version must be"),
    # Sites
    "no sites": (top(sites=[]), "sites is empty"),
    "a text for the sites": (top(sites="act1@in"), "sites must be a list"),
    "a site twice": (config(lambda c: c["sites"].append(c["sites"][0])), "sites named twice"),
    "a site too few": (config(lambda c: c["sites"].pop()), "too many act2@in"),
    "a site of another name": (site(site="act9@in"), "missing act9@in"),
    "a path for a site": (site(site="../../etc/passwd"), r"sites\[0\].*name"),
    "a path in a site's name": (site(site="../act1@in"), r"missing \.\./act1@in"),
    "null for a site": (config(lambda c: c["sites"].__setitem__(0, None)), r"sites\[0\]: expected"),
    "a shape of other dimensions": (site(shape=[4]), "axis must be"),
    "a shape of other channels": (site(shape=[5, 1, 1]), "mean must be .* shape"),
    "a shape beyond memory": (site(shape=[10**12]), "shape must be"),
    "a negative shape": (site(shape=[-4, 1, 1]), "shape must be"),
    "another axis": (site(axis=[-1]), r"axis must be \[-3\]"),
    "a negative alpha": (site(alpha=-0.1), "alpha must be a finite number"),
    "a text for alpha": (site(alpha="0.1"), "alpha must be a finite number"),
    "an alpha of 400 digits": (site(alpha=10**400), "alpha must be a finite number"),
    # The rest of the config
    "an unknown centre": (top(center="median"), "center must be one of"),
    "no kind of statistics": (top(statistics=None), "statistics must be one of"),
    "no base": (top(base=None), "base must be a dict"),
    "no fingerprint": (base(fingerprint={}), "another base"),
    "an unknown dtype": (base(dtype="loat32"), "dtype must be one of"),
    "a number for the source": (base(source=1), "source must be a str"),
    "a list for the options": (base(options=[]), "options must be a dict"),
    "no mean of the pixels": (base(pixels={}), "mean must be 1 to 4 numbers"),
    "an infinite std": (base(pixels=PIXELS | {"std": [10**400]}), "std must be finite"),
    "a number for bgr": (base(pixels=PIXELS | {"bgr": 1}), "bgr must be true or false"),
    "an input size of one": (base(pixels=PIXELS | {"input_size": [3]}), "input_size must be"),
    "a list of versions": (top(versions=["1"]), "versions must be a dict"),
    "a number for a version": (
        config(lambda c: c["versions"].update(torch=2)),
        "versions must map",
    ),
    "a list for calibration": (top(calibration=[]), "calibration must be a dict"),
    "results without eps": (top(evaluation={"n": 1}), "evaluation lacks eps"),
    # Tensors
    "no mean": (tensors(lambda t: t.pop("act1@in.mean")), "missing act1@in.mean"),
    "no count": (tensors(lambda t: t.pop("act1@in.count")), "missing act1@in.count"),
    "a tensor too many": (tensors(lambda t: t.update(x=torch.ones(1))), "too many x"),
    "a tensor twice": (tensor_twice, "the key 'act1@in.mean' stands there twice"),
    "a tensor of an invisible name": (
        tensors(lambda t: t.update({"x\u202e\x1b[2J\n": torch.ones(1)})),
        r"too many x\\u202e\\x1b\[2J\\n\.",
    ),
    "a path for a tensor": (
        tensors(lambda t: t.update({"../x": torch.ones(1)})),
        r"too many \.\./x",
    ),
    "a mean of another shape": (
        tensors(lambda t: t.update({"act1@in.mean": torch.ones(4)})),
        "mean must be torch.float32 of shape",
    ),
    "a count per channel": (
        tensors(lambda t: t.update({"act1@in.count": torch.ones(4).long()})),
        "count must be torch.int64 of shape",
    ),
    "a mean in half precision": (
        tensors(lambda t: t.update({"act1@in.mean": torch.ones(4, 1, 1).half()})),
        "mean must be torch.float32",
    ),
    "sums in single precision": (
        tensors(lambda t: t.update({"act1@in.m2": torch.ones(4, 1, 1)})),
        "m2 must be torch.float64",
    ),
    "NaN in a mean": (tensors(lambda t: t["act1@in.mean"].fill_(torch.nan)), "mean must be finite"),
    "an infinite mean": (
        tensors(lambda t: t["act1@in.mean"][2].fill_(-torch.inf)),
        "mean must be finite",
    ),
    "an infinite sum": (tensors(lambda t: t["act1@in.m2"].fill_(torch.inf)), "m2 must be finite"),
    "a negative sum": (
        tensors(lambda t: t["act1@in.m2"][1].fill_(-1e-9)),
        "m2 must be finite and not negative",
    ),
    "a variance beyond float32": (
        tensors(lambda t: t["act1@in.m2"].fill_(1e300)),
        "finite in float32",
    ),
    "a negative count": (
        tensors(lambda t: t["act1@in.count"].fill_(-1)),
        "count must be finite and not negative",
    ),
    "all variances 0": (
        tensors(lambda t: [t[f"{name}@in.m2"].zero_() for name in ("act1", "act2")]),
        "nothing was measured",
    ),
}
