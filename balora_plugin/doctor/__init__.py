"""What is installed, what this machine can do, and what of a config cannot run on it: the facts of `balora doctor`."""

from .machine import Machine, look
from .report import Line, Report, about
from .requested import problems

__all__ = ["Line", "Machine", "Report", "about", "look", "problems"]
