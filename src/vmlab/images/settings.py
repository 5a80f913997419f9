"""Where images are kept and fetched from: the configuration file, then the environment over it.

Not settings of machines. The file is `config.toml` in the user's configuration directory, or the
one that `VMLAB_CONFIG` names; its table is `[images]`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field

from vmlab.images.errors import ImageError
from vmlab.machine.documents import build
from vmlab.machine.sizes import GIB, Size

VARIABLES = {
    "VMLAB_IMAGE_STORE": "store",
    "VMLAB_IMAGE_STORE_LIMIT": "limit",
    "VMLAB_DEBIAN_KEYRING": "debian_keyring",
}


class ImageSettings(BaseModel):
    """The settings, with their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Path | None = Field(None, description="directory of the store")
    limit: Size = Field(20 * GIB, description="the store is pruned when it is larger than this")
    debian_mirror: str | None = Field(None, description="URL of a mirror, the part before /dists")
    debian_security_mirror: str | None = Field(
        None, description="URL of a mirror of the security archive"
    )
    pockets: tuple[Literal["updates", "security"], ...] | None = Field(
        None,
        description="suites to read besides, such as bookworm-updates; what apt uses if not given",
    )
    debian_keyring: Path | None = Field(None, description="trusted keys instead of Debian's own")
    check_date: bool | None = Field(None, description="refuse an index from the future")
    check_valid_until: bool | None = Field(None, description="refuse an index that has expired")
    timeout_seconds: float = Field(30.0, gt=0, le=3600, description="of a silent mirror")
    retry_seconds: float = Field(0.5, ge=0, le=60, description="before a second try; it doubles")
    pins: dict[str, str] = Field(
        default_factory=dict, description="suite -> digest of the index snapshot to use"
    )

    @property
    def directory(self) -> Path:
        """The store's directory."""
        return self.store or default_store(os.environ)


def default_store(environment: Mapping[str, str]) -> Path:
    """Where the store is when nothing says otherwise."""
    home = environment.get("VMLAB_HOME")
    return (
        Path(home) / "images"
        if home
        else platformdirs.user_data_path("vmlab", appauthor=False) / "images"
    )


def load(environment: Mapping[str, str] | None = None) -> ImageSettings:
    """The settings of this user.

    Raises:
        InvalidSpec: a value is not what it has to be.
        ImageError: the configuration file cannot be read.
    """
    environment = os.environ if environment is None else environment
    file = Path(
        environment.get("VMLAB_CONFIG")
        or platformdirs.user_config_path("vmlab", appauthor=False) / "config.toml"
    )
    data = dict(_table(file))
    source = str(file)
    for variable, field in VARIABLES.items():
        if environment.get(variable):
            data[field] = environment[variable]
            source = f"{file} and {variable}"
    if "store" not in data:
        data["store"] = default_store(environment)
    return build(ImageSettings, data, source=source)


def _table(file: Path) -> Mapping[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ImageError(
            f"the configuration file {file} cannot be read: {error}", hint="mend or remove it"
        ) from error
    table = document.get("images", {})
    if not isinstance(table, dict):
        raise ImageError(f"{file}: images has to be a table", hint="write [images]")
    return table
