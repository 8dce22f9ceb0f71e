"""The torch side of a public function, where a test has sent its calls to Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from nextn.kernels import gpu


def in_torch(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function returns without Triton. Tensors are taken as they are; give it those of the CPU."""
    with mock.patch.object(gpu, "suits", return_value=False):
        return function(*arguments, **options)
