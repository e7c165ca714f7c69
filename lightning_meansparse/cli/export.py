"""`meansparse export`: a sparsified classifier as ONNX or as a program of torch.export."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_meansparse.cli.words import Words


def run(args: Sequence[str]) -> None:
    """Load the classifier, put the adapter on if there is one to put, write the file."""
    words = Words("export")
    words.add_argument("model", help="meansparse/ORG/NAME, a folder, or a base such as timm/NAME")
    words.add_argument("--output", required=True, help="the file, ending in .onnx or .pt2")
    words.add_argument("--adapter", help="folder or Hub id of the adapter, if model is a base")
    words.add_argument("--alpha", type=float, help="for every site (default: the adapter's)")
    words.add_argument("--format", choices=("onnx", "torch"), help="if not told by the ending")
    words.add_argument(
        "--input_size", type=int, nargs=3, metavar=("C", "H", "W"), help="if not the model's own"
    )
    words.add_argument("--revision", help="commit, tag or branch of the model on the Hub")
    given = words.parse_args(args)

    from lightning_meansparse.adapter import load_adapter
    from lightning_meansparse.classifier import load_classifier
    from lightning_meansparse.cli.console import calm, make_console
    from lightning_meansparse.deployment import export

    console = make_console()
    with calm(console):
        classifier = load_classifier(given.model, revision=given.revision)
        if given.adapter:
            load_adapter(classifier, given.adapter)
        path = export(
            classifier,
            given.output,
            format=given.format,
            alpha=given.alpha,
            input_size=given.input_size,
        )
    size = path.stat().st_size / 1e6
    console.print(f"{path} ({size:,.1f} MB), checked against the model", soft_wrap=True)
