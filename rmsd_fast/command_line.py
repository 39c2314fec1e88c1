"""Parse the command lines of the programs. Settings are written as `section.field=value`, without dashes."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import NoReturn

from rmsd_fast.config import RunConfig

_UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """An argument parser that explains how to write a setting if it was written as an option: `--sft.steps=4`."""

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            top_level = {field.name for field in fields(RunConfig)}
            for argument in message.removeprefix(_UNKNOWN).split():
                name, _, value = argument.lstrip("-").partition("=")
                if argument.startswith("-") and (name in top_level or re.fullmatch(r"[a-z]\w*\.\w+", name)):
                    message += f"; settings have no dashes: write {name}={value or '<value>'}"
                    break
        super().error(message)
