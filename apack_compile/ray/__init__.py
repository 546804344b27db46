"""Batch jobs on Ray Data (docs/guides/batch_jobs.md). Ray itself is needed only by those who start the job."""

from apack_compile.ray.answers import Answers
from apack_compile.ray.job import BatchJob

__all__ = ["Answers", "BatchJob"]
