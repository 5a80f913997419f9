"""A QMP client that sees every byte."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


class Wire:
    """A client that sees every byte."""

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(300)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.lines = self.socket.makefile("rb")
        self.greeting = self.read()
        if negotiate:
            assert self.ask("qmp_capabilities") == {"return": {}}

    def read(self) -> Any:
        return json.loads(self.lines.readline())

    def ask(self, name: str, /, **message: Any) -> Any:
        self.socket.sendall(json.dumps({"execute": name, **message}).encode())
        return self.read()

    def error(self, name: str, /, **arguments: Any) -> tuple[str, str]:
        told = self.ask(name, arguments=arguments)["error"]
        return told["class"], told["desc"]

    def close(self) -> None:
        self.lines.close()
        self.socket.close()
