"""What is installed, what this machine can do, and what of a config cannot run on it: the facts of `balora doctor`."""

from .gpus import gpu_named, with_gpu
from .machine import Machine, look
from .memory import Memory, memory_on
from .report import Line, Report, about
from .requested import problems

__all__ = ["Line", "Machine", "Memory", "Report", "about", "gpu_named", "look", "memory_on", "problems", "with_gpu"]
