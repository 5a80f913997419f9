"""The scripts that are shipped are those of their projects, and pages find them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import web_assets

from vmlab.machine.errors import ResourceNotFound
from vmlab.manager.web.assets import asset, asset_at, asset_url


def test_what_is_shipped_is_what_its_projects_released() -> None:
    assert list(web_assets.problems()) == []
    for package in web_assets.packages():
        assert package["integrity"].startswith("sha512-")
        assert package["licence"]


def test_a_file_that_was_changed_is_missing_or_is_nobodys_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "assets"
    shutil.copytree(web_assets.ASSETS, copy)
    folder = copy / web_assets.FOLDER
    (folder / "xterm.js").write_text("alert(1)")
    (folder / "addon-fit.js").unlink()
    (folder / "stray.js").write_text("")
    manifest = json.loads((copy / web_assets.MANIFEST).read_text())
    del manifest["packages"][0]["files"]["htmx.LICENSE"]
    (copy / web_assets.MANIFEST).write_text(json.dumps(manifest))
    assert sorted(web_assets.problems(copy)) == [
        "addon-fit.js of @xterm/addon-fit is not there",
        "htmx.LICENSE is of no package of third_party.json",
        "htmx.org has no licence beside it",
        "stray.js is of no package of third_party.json",
        "xterm.js is not that of @xterm/xterm 6.0.0",
    ]


def test_an_address_changes_with_what_is_there() -> None:
    url = asset_url("page.css")
    digest, name = url.rsplit("/", 2)[1:]
    assert asset_at(digest, name).data == asset("page.css").data
    with pytest.raises(ResourceNotFound, match="is not what it was"):
        asset_at("0" * 16, name)
    for wrong in ("../routes.py", "third_party/htmx.min.js", ""):
        with pytest.raises(ResourceNotFound, match="no file"):
            asset(wrong)


def test_htmx_and_its_extension_are_one_script() -> None:
    script = asset("htmx.js").data
    folder = web_assets.ASSETS / web_assets.FOLDER
    for part in ("htmx.min.js", "hx-sse.min.js"):
        assert (folder / part).read_bytes() in script
