"""Shared by all tests: quiet bars, one thread a process, and trajectory sources that live in memory."""
import os

os.environ.setdefault("RAPTOR_PROGRESS", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")
