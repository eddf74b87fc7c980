"""Inputs to pixels in processes of their own: `DecodePool`.

A coordinator (the process that holds the pool) starts one helper process, which imports what decoding needs once and
forks the workers: they share its memory, are there within milliseconds, and one that dies is replaced as quickly.
Pixels lie in a ring of anonymous shared memory, which ends with the last process that has it open, however that ends;
of each chunk of inputs one Arrow batch of columns comes back. A worker marks in shared memory which image it is at and
since when: that tells which image is to blame when it dies or hangs.
"""

from __future__ import annotations

from .helper import Helper as Helper
from .pool import DecodedChunk as DecodedChunk
from .pool import DecodePool as DecodePool
from .pool import usable_cores as usable_cores
from .work import BACKOFF_SECONDS as BACKOFF_SECONDS
from .work import Job as Job
from .work import Meter as Meter
from .work import chunk_schema as chunk_schema
