"""The black box: a ring file that outlives the process. Written as rows arrive on the host, read at any moment.

    preamble    where everything else stands, and a checksum
    header      JSON: versions, the rank, facts of the run, layers and sites, statistics, capacity, triggers, the process
    2 statuses  JSON: running, ended, failed ...; what the triggers saw; where the dump lies. Written in turns
    records     places of a fixed size; the record of number n (from 1 on) stands in place (n - 1) % places

All numbers are little-endian, and floats are IEEE 754. Version 1:

    preamble, 52 bytes
        8s   b"\\x89nobsbox"
        u32  version
        u32  bytes of the header, which begins behind the preamble
        u32  CRC-32 of the header
        u32  bytes of a record
        u32  places: one more than `capacity`, so that a record torn by the process's death costs none of those
        u32  bytes of a status
        u64  offset of the first status; the second follows
        u64  offset of the first record
        u32  CRC-32 of the bytes before
    status
        u32  CRC-32 of what follows, text included
        u32  bytes of the text
        u64  number, from 1 on; the higher of the intact two counts
             the text: JSON in UTF-8
    record
        u32  CRC-32 of all that follows, padding included
        u16  scalars in the tail
        u16  scalars for which there was no room
        u64  number; 0 where nothing was written yet
        i64  step
        f64  Unix time in seconds
        u32  bytes of the text that named the batch, and one; 0 without a batch
        pad  to 64 bytes
        f32  taps x 8: for each tap of the header the statistics of the header, unscaled, as in `nobs.History.values`
        2048 bytes, the tail: for each scalar u8 bytes of its name, the name in UTF-8, f64; then the text of the batch

A file is read by any version of nobs that is not older than it. When the process dies, by whatever, the page cache of the system
keeps what was written; `durable=True` writes through to the disk, for machines that lose power.
"""

from ._format import MAGIC as MAGIC
from ._format import Header as Header
from ._format import Status as Status
from ._process import this_process as this_process
from ._reader import OpenBox as OpenBox
from ._reader import Recording as Recording
from ._reader import read as read
from ._writer import BlackBox as BlackBox
from ._writer import described as described
