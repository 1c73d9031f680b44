"""The differential run: the only place where engine, reference, comparison and verdict meet.

Request, inputs, engine runs, reference runs, legs, verdict and record: data flows one way.
"""

from diffharness.pipeline.differential import run
from diffharness.pipeline.request import RunRequest

__all__ = ["RunRequest", "run"]
