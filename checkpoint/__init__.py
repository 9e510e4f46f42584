"""Checkpoints: their content (record), reading files (read, layouts), filling models (fill), writing files (save)."""

from .read import find, read
from .record import Checkpoint, CheckpointError, Progress

__all__ = ["Checkpoint", "CheckpointError", "Progress", "find", "read"]
