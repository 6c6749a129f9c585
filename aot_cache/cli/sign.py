"""`aot-cache sign`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from aot_cache.cli.command import AsJson
from aot_cache.cli.render import terminal
from aot_cache.errors import DeclarationError
from aot_cache.store import read_bundle, signature


def sign(
    paths: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundle files.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="File of the Ed25519 private key. Its password: AOT_CACHE_KEY_PASSWORD."),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the signatures of other keys that are there.")] = False,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Print the text that is signed of one bundle, and sign nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Sign bundles: the signature is written to BUNDLE.sig. It covers every byte of the bundle.

    `openssl genpkey -algorithm ed25519 -out key.pem` makes a key, and `openssl pkey -in key.pem -pubout` prints its public key.
    """
    if (key is None) != show_text or (show_text and (add or as_json or len(paths) > 1)):
        expected = "--key PEM, or --show-text and one bundle alone"
        raise DeclarationError(
            expected, "neither" if key is None and not show_text else "more", "see `aot-cache sign --help`"
        )
    bundles = [read_bundle(path) for path in paths]  # before anything is written
    if key is None:
        sys.stdout.write(signature.signed_text(bundles[0].digest).decode("ascii"))
        return
    private = signature.private_key(key)
    facts: dict[str, Any] = {
        "key": signature.public_key(private).id,
        "bundles": [
            {
                "path": str(bundle.path),
                "digest": bundle.digest,
                "complete": bundle.manifest.get("complete") is True,
                "signature": str(signature.sign(bundle.path, bundle.digest, private, add)),
            }
            for bundle in bundles
        ],
    }
    terminal.document(facts) if as_json else terminal.signed(facts)
