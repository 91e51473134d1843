"""How a device is named, told without torch."""

from __future__ import annotations

import re

from certtrain.errors import UsageError, shown


def check_device_name(name: str) -> None:
    """Refuse what is no device of torch, or one that nothing can be computed on; whether there is one, torch knows.

    Raises:
        UsageError: neither auto, cpu, cuda nor cuda with a number.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"device {shown(name)} is not to be had here: choose auto, cpu, cuda, or cuda:0, cuda:1, ...")
