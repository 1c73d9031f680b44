"""The differential run: the only place where engine, reference, comparison and verdict meet.

    request ──► inputs ──► engine runs ──► reference runs ──► legs ──► verdict, record
"""

from diffharness.pipeline.run import RunRequest, run

__all__ = ["RunRequest", "run"]
